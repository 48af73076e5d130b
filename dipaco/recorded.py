"""A step of a GPU, recorded once and replayed from then on (CUDA graphs).

A GPU computes the hundreds of kernels of a small network's step in less time than Python takes to
launch them one by one. A recording is launched as one.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_STEPS_BEFORE = 2  # that run as written: libraries load, kernels compile, an optimizer sets up
_MAX_AHEAD = 2  # steps that may wait for the device, so that time measured here means something

Work = Callable[..., Tensor]
"""Maps inputs on the device, the very same tensors each time, to one tensor there.

It may write to what else is on the device, waits for nothing, and always does the same.
"""


class RecordedStep:
    """Steps on a stream of their own, so that those of several may run at once.

    Does not keep the `Work` it is given: whose work it is usually keeps this one, and would be let
    go late in a circle.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._inputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._recorded_result: Tensor | None = None
        self._num_steps = 0
        self._ends: deque[torch.cuda.Event] = deque()

    def begin(self, work: Work, inputs: Sequence[Tensor]) -> None:
        """Start a step with inputs of the CPU, whose shapes are those of the first step.

        It comes after whatever the device was given to do so far, but for steps of others that have
        begun and not ended.
        """
        if len(self._ends) == _MAX_AHEAD:
            self._ends.popleft().synchronize()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if not self._inputs:
                self._inputs = [torch.empty_like(value, device=self._device) for value in inputs]
            for place, value in zip(self._inputs, inputs, strict=True):
                place.copy_(value.pin_memory(), non_blocking=True)
            if self._graph is None:
                self._result = work(*self._inputs)
                self._num_steps += 1
            else:
                self._graph.replay()
                self._result = self._recorded_result
            self._ends.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            self._ends[-1].record()
            if self._graph is None and self._num_steps == _STEPS_BEFORE:
                # On this thread: it has all handles of libraries that are needed. Other threads may
                # go on using the device meanwhile.
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._recorded_result = work(*self._inputs)
                self._graph = graph

    def end(self) -> Tensor:
        """The result of the step that was begun; what the device is given to do now comes after."""
        assert self._result is not None, "a step is begun before it is ended"
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._result.clone()
