"""The operator's side: prepares a run, and is its first peer. Never trains.

    prepare   a corpus becomes a run: tokenizer, dense start, router, shards, signed manifest
    node      the first address and the first seeder; keeps every module
    cli       `dipaco-bootstrap prepare | serve | status`

Nothing imports this package, and a run needs it only until its first volunteers are there.
"""
