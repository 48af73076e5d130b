"""The model of a run, on one machine: no network, no event loop, no clock.

The files in the order in which they stand on one another:

    errors       everything this package raises on purpose
    digest       the name of a blob, and of each of its chunks
    config       what the whole run agrees on: TOML in, validated, with a fingerprint
    topology     levels, modules and paths
    tensors      safetensors with a layout known beforehand: same tensors, same bytes
    checkpoint   the state of a module (parameters, momentum) as bytes
    outer        weights of contributions and the outer step, in single roundings
    compression  outer gradients on the wire, with error feedback
    model        the network of one path, cut into modules
    evaluate     perplexity without the routing prefix
    shards       the sequences of one path
    device       the device a volunteer names
    inner        the inner loop of one path on one device
    corpus       documents, from anywhere, in one order
    tokenizer    byte-level BPE
    sequences    documents to rows of tokens
    routing      features, k-means, router
    start        corpus to start states: everything a run begins with, resumable
    reference    the whole algorithm in one readable loop: read this one first
    progress     progress bars of the command lines
    cli          `dipaco train`

`errors`, `digest`, `config`, `topology` and `cli` import no torch.
"""
