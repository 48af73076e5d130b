from dataclasses import replace

import torch

from dipaco.compression import EncodedGradient, encode
from dipaco.topology import ModuleID
from peer.reduction import reduce
from tests.little_run import identity, little_config, make_run
from tests.made_history import made_history


def test_a_rate_by_paths_is_that_of_the_module_whoever_contributes() -> None:
    """One path of the embedding's four contributes, and one of the two through each other one."""
    config = little_config()
    outer = replace(config.outer, learning_rate_by_paths=((1.0, 0.5), (4.0, 0.0)))
    run = make_run(replace(config, outer=outer), operator=identity(1), start_time=0.0)
    for module, rate in ((ModuleID(0, 0), 0.0), (ModuleID(1, 0), 0.5)):
        before = run.starts[module]
        (certificate,) = made_history(
            run.manifest, module, identity(1), num_versions=1, state="a" * 64
        )
        raw = encode(torch.ones(before.num_parameters), "float32")
        gradient = EncodedGradient(raw, "float32", num_parameters=before.num_parameters)
        update = reduce(certificate.proposal, before, [gradient], run.manifest)
        moved = before.parameters - update.state.parameters
        assert torch.allclose(moved, torch.tensor(rate * (1 + outer.momentum)))
