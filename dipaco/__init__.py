"""The model of a run, on one machine: no network, no event loop, no clock.

`dipaco.reference` has the whole algorithm in one readable loop: read that first. No torch is
imported by `errors`, `digest`, `config`, `topology` and `cli`.
"""
