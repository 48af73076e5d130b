"""The model of a run, on one machine: no network, no event loop, no clock.

The files in the order in which they stand on one another:

    errors          everything this package raises on purpose
    digest          the name of a blob, and of each of its chunks
    config          what the whole run agrees on: TOML in, validated, with a fingerprint
    topology        levels, modules and paths
    tensors         safetensors with a layout known beforehand: same tensors, same bytes
    checkpoint      the state of a module (parameters, momentum) as bytes
    outer           weights of contributions and the outer step, in single roundings
    compression     outer gradients on the wire, with error feedback
    model           the network of one path, cut into modules
    llama           checkpoints in, and a path out for `transformers`
    evaluate        perplexity and log-likelihoods without the routing prefix
    shards          the sequences of one path
    device          the device a volunteer names
    inner           the inner loop of one path on one device
    side_by_side    several small paths on one device at once
    corpus          documents, from anywhere, in one order
    tokenizer       byte-level BPE
    sequences       documents to rows of tokens
    routing         features, centers, and what a router is
    tiny_lm         ... by tiny language models
    discriminative  ... by which path predicts best
    token_router    ... at any token of a sequence
    sharding        the corpus given to the paths by a router
    start           everything a run begins with, on disk
    preparation     corpus to start, in stages that can be resumed
    rounds          what each round on one machine leaves on disk
    reference       the whole algorithm in one readable loop: read this one first
    rerouting       scoring sequences whose path changes
    trained         what a training left, path by path
    generate        text, token by token
    progress        progress bars of the command lines
    cli             `dipaco`; its commands are in training_commands and usage_commands

`errors`, `digest`, `config`, `topology` and `cli` import no torch.
"""
