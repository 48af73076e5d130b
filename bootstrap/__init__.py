"""The operator's side: prepares a run, and is its first peer. Never trains.

    prepare     a corpus becomes a run: tokenizer, dense start, router, shards, signed manifest
    node        the first address and the first seeder; keeps every module
    operator    the run's next manifests: new shards after a phase, more modules
    gathering   what the peers' paths make of the router data, for a phase
    corpus      the corpus, sharded anew
    growth      asking for more modules
    cli         `dipaco-bootstrap prepare | serve | grow | status`

Nothing imports this package, and a run needs it only until its first volunteers are there.
"""
