"""The discriminative router: the path that predicts a sequence best, guessed from its prefix.

Router data, which no path trains on, is scored by every path; the best path is the label; a linear
classifier learns it from the 32-token feature; its bias is calibrated so that as many sequences go
to each path as the labels say (paper 2.4.2, 7.2.1). Features come from the frozen dense start,
labels from the paths as they are.
"""

# ruff: noqa: N803, N806 - arrays carry their shape in their name: N sequences, D width, P paths

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dipaco.errors import BadBytes
from dipaco.routing import LinearRouter
from dipaco.tensors import decode_tensors, encode_tensors, is_finite

_MIN_SHARE = 0.25  # of an even share: the least that calibration gives to a path
_CALIBRATION_STEPS = 2000
_CALIBRATION_RATE = 0.5
_MAX_ITERATIONS = 300
_INVERSE_PENALTY = 0.1  # of the weights' squares; router data is small next to D x P weights


def encode_scores(scores_N: Tensor) -> bytes:
    """Log-likelihoods (nats) of the router data under one path, float32, as safetensors."""
    return encode_tensors({"scores": scores_N})


def decode_scores(raw: bytes | memoryview, num_rows: int) -> Tensor:
    """The inverse of `encode_scores`; BadBytes unless it is `num_rows` finite values."""
    try:
        scores_N = decode_tensors(raw, {"scores": (torch.float32, (num_rows,))})["scores"]
    except ValueError as error:
        raise BadBytes(f"not scores of the router data: {error}") from error
    if not is_finite(scores_N):
        raise BadBytes("not scores of the router data: a value is not finite")
    return scores_N


def fit_linear_router(features_ND: Tensor, scores_NP: Tensor, seed: int) -> LinearRouter:
    """A calibrated classifier from features to the path with the best score (paper 7.2.1)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    num_paths = scores_NP.shape[1]
    labels_N = scores_NP.argmax(dim=1).numpy()
    mean_D = features_ND.mean(dim=0)
    scale_D = features_ND.std(dim=0, correction=0).clamp_min(1e-6)
    inputs_ND = ((features_ND - mean_D) / scale_D).double().numpy()
    present = np.unique(labels_N)
    weight_PD = np.zeros((num_paths, inputs_ND.shape[1]))
    if len(present) > 1:
        model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=_MAX_ITERATIONS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near the optimum is enough
            model.fit(inputs_ND, labels_N)
        if len(present) == 2:  # the library keeps one row for two classes
            weight_PD[present] = np.stack([-model.coef_[0], model.coef_[0]]) / 2
        else:
            weight_PD[present] = model.coef_
    target_P = target_shares(np.bincount(labels_N, minlength=num_paths))
    bias_P = calibrated_bias(inputs_ND @ weight_PD.T, target_P)
    return LinearRouter(
        mean_D=mean_D,
        scale_D=scale_D,
        weight_PD=torch.from_numpy(weight_PD.astype(np.float32)),
        bias_P=torch.from_numpy(bias_P.astype(np.float32)),
    )


def target_shares(counts_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of sequences that each path shall get: as labelled, but none next to nothing."""
    shares_P = np.maximum(counts_P / counts_P.sum(), _MIN_SHARE / len(counts_P))
    scaled: NDArray[np.float64] = shares_P / shares_P.sum()
    return scaled


def calibrated_bias(
    logits_NP: NDArray[np.float64], target_P: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The bias [P] with which the best paths of the logits are distributed as `target_P` says.

    A path that is chosen too rarely has its bias raised by the logarithm of how much too rarely;
    steps shrink, and the best bias on the way is kept. The paper gives no procedure.
    """
    num_rows, num_paths = logits_NP.shape
    spread = max(float(logits_NP.std()), 1e-3)
    bias_P = best_P = np.zeros(num_paths)
    least = np.inf
    for step in range(_CALIBRATION_STEPS):
        chosen_N = (logits_NP + bias_P).argmax(axis=1)
        shares_P = np.bincount(chosen_N, minlength=num_paths) / num_rows
        # Half a sequence more, so that a path that nobody chose has a logarithm.
        gap_P = np.log(target_P + 0.5 / num_rows) - np.log(shares_P + 0.5 / num_rows)
        distance = float(np.abs(target_P - shares_P).sum())
        if distance < least:
            least, best_P = distance, bias_P
        if not distance:
            break
        rate = _CALIBRATION_RATE * spread / (1.0 + step / 50)
        bias_P = bias_P + rate * np.clip(gap_P, -2.0, 2.0)
    centered_P: NDArray[np.float64] = best_P - best_P.mean()
    return centered_P
