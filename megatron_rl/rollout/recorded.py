"""Functions of tensors that are recorded as they run, and repeated without their Python.

A step of a small model takes longer in the Python of its modules than in the operations that they
call. What a recording repeats are those operations, in their order, on tensors of the same shapes:
the same bits. CUDA graphs do that on GPUs; this is for CPUs, where torch has nothing like it.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode

TensorFunction = Callable[..., Tensor]

MOST_RECORDINGS = 256
"""A recording of a step of 30 layers takes about half a MiB."""


class Recordings:
    """Recordings of functions of tensors, each under a key.

    A function may read and write other tensors, too, which stay where they are: weights and caches.
    It is repeated on what they hold by then. Whoever calls drops the recordings when such a tensor
    is replaced by another one. Ranks whose function has collectives run the same keys in one order.
    """

    def __init__(self) -> None:
        self._repeats: dict[Hashable, TensorFunction | None] = {}
        self._seen: set[Hashable] = set()

    def run(self, key: Hashable, function: TensorFunction, *inputs: Tensor) -> Tensor:
        """function(*inputs). key: the same for calls that differ in what tensors hold alone.

        It is recorded when a key comes for the second time, for that takes longer than to run it.
        A function that takes a number out of a tensor is never repeated: with another number it
        might have done something else. `tolist` and `numpy` are not noticed: it must not use them.
        """
        if key not in self._seen:
            self._seen.add(key)
            return function(*inputs)
        if key not in self._repeats:
            if len(self._repeats) == MOST_RECORDINGS:
                self._repeats.clear()
            recorder = _Recorder()
            with recorder:
                output = function(*inputs)
            self._repeats[key] = _repeat_of(recorder.calls, inputs, recorder.original(output))
            return output
        repeat = self._repeats[key]
        return function(*inputs) if repeat is None else repeat(*inputs)


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DROPOUT = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)


@dataclass(frozen=True, eq=False)
class _Call:
    """An operation that has run."""

    operation: torch._ops.OpOverload
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any

    @property
    def read(self) -> list[Tensor]:
        return [*_tensors_in(self.args), *_tensors_in(self.kwargs.values())]

    @property
    def made(self) -> list[Tensor]:
        return [] if self.is_collective else [*_tensors_in([self.result])]

    @property
    def written(self) -> list[Tensor]:
        """What it wrote to, among what it read."""
        if self.is_collective:  # its schema does not say
            return self.read
        given = [*self.args, *[None] * (len(self._arguments) - len(self.args))]
        return [
            tensor
            for argument, value in zip(self._arguments, given, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors_in([self.kwargs.get(argument.name, value)])
        ]

    @property
    def is_collective(self) -> bool:
        """It writes to tensors that were given to it, and what it gives back is to be awaited."""
        return self.operation.namespace == "c10d"

    @property
    def is_repeatable(self) -> bool:
        """It made nothing but tensors, and does the same every time."""
        if self.is_collective:
            return True
        results = self.result if isinstance(self.result, (tuple, list)) else [self.result]
        made_tensors = self.gives_nothing or all(isinstance(one, Tensor) for one in results)
        return made_tensors and not self._is_random

    @property
    def gives_nothing(self) -> bool:
        """It only writes to tensors that were given to it, as collectives in shared memory do."""
        return self.result is None

    @property
    def _is_random(self) -> bool:
        if self.operation is _ATTENTION:
            given = dict(zip((one.name for one in self._arguments), self.args, strict=False))
            return bool({**given, **self.kwargs}.get("dropout_p", 0.0))
        return torch.Tag.nondeterministic_seeded in self.operation.tags

    @property
    def _arguments(self) -> Sequence[Any]:
        return self.operation._schema.arguments


class _Recorder(TorchDispatchMode):
    """Notes what runs, without the calls whose result is a tensor that was given to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._same: dict[int, tuple[Tensor, Tensor]] = {}  # by the result's id: it, and the given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = _each(self.original, args)
        call = _Call(func, given, _each(self.original, kwargs or {}), result)
        is_idle_dropout = func in _DROPOUT and result is args[0] and not args[2]
        if is_idle_dropout or (call.is_repeatable and not call.written and self._is_given(call)):
            self._same[id(result)] = result, given[0]
        elif call.read or call.made:
            self.calls.append(call)
        return result

    def original(self, value: Any) -> Any:
        """The tensor that a value is the same as, or itself."""
        return self._same[id(value)][1] if id(value) in self._same else value

    def _is_given(self, call: _Call) -> bool:
        """True where the result is the first argument, or a view of it that is like it."""
        result, given = call.result, call.args[0] if call.args else None
        return (
            isinstance(result, Tensor)
            and isinstance(given, Tensor)
            and _memory_of(result) == _memory_of(given)
            and result.dtype == given.dtype
            and result.shape == given.shape
            and result.stride() == given.stride()
            and result.storage_offset() == given.storage_offset()
        )


def _each(function: Callable[[Any], Any], values: Any) -> Any:
    """function of each of the values, and of those in lists of them."""
    if isinstance(values, dict):
        return {name: _each(function, value) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_each(function, value) for value in values)
    return function(values)


def _repeat_of(
    calls: Sequence[_Call], inputs: Sequence[Tensor], output: Tensor
) -> TensorFunction | None:
    """What repeats these calls on other inputs; None where they are not to be repeated."""
    if not all(call.is_repeatable for call in calls):
        return None
    calls = _changing(calls, inputs)
    places = _Places(inputs)
    last_use = {id(tensor): number for number, call in enumerate(calls) for tensor in call.read}
    last_use[id(output)] = len(calls)
    program = []
    for number, call in enumerate(calls):
        function, take = _spelled(call, places)
        places.free(call.read, last_use, number)
        program.append((function, take, places.of_result(call)))
        places.free(call.made, last_use, number)
    at_start, place_of_output, num_inputs = places.memory, places.of(output), len(inputs)

    def repeat(*given: Tensor) -> Tensor:
        memory = at_start.copy()  # so that results are gone when it is done
        memory[:num_inputs] = given
        for function, take, place in program:
            memory[place] = function(*take(memory))
        result: Tensor = memory[place_of_output]
        return result

    return repeat


def _changing(calls: Sequence[_Call], inputs: Sequence[Tensor]) -> list[_Call]:
    """Without the calls that would give the same again: views of what stays where it is, and what
    is made of nothing else than such results.
    """
    changing = {id(tensor) for tensor in inputs}
    settled: set[int] = set()  # made by a call that is left out
    written = {_memory_of(tensor) for call in calls for tensor in call.written}
    outside = set(written)  # memory whose content is not known here
    left = []
    for call in calls:
        read, made = call.read, call.made
        outside |= {_memory_of(one) for one in read if id(one) not in changing | settled}
        memories = {_memory_of(one) for one in read}
        new = [one for one in made if _memory_of(one) not in memories]
        is_settled = (
            not any(id(one) in changing for one in read)
            and not call.written
            and (not new or not outside & {*memories, *map(_memory_of, new)})
        )
        if is_settled:
            settled |= {id(one) for one in made}
        else:
            left.append(call)
            known = settled | {id(one) for one in read}
            changing |= {id(one) for one in made if id(one) not in known}
    return left


class _Places:
    """Where tensors are while a recording is repeated: inputs, constants and results."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.memory: list[Any] = [None] * len(inputs)
        self._place = {id(tensor): place for place, tensor in enumerate(inputs)}
        self._results: set[int] = set()  # whose places serve again when they are used up
        self._free: list[int] = []

    def of(self, value: Any) -> int:
        """The place of a result or an input, or else of a constant."""
        if isinstance(value, Tensor) and id(value) in self._place:
            return self._place[id(value)]
        self.memory.append(value)
        if isinstance(value, Tensor):
            self._place[id(value)] = len(self.memory) - 1
        return len(self.memory) - 1

    def of_result(self, call: _Call) -> int | slice:
        """Where a call's result goes; several tensors stand one behind the other."""
        if isinstance(call.result, Tensor):
            return self._taken(call.result)
        if call.is_collective or call.gives_nothing:
            self.memory.append(None)  # its tensors are where they were
            return len(self.memory) - 1
        first = len(self.memory)
        self.memory += [None] * len(call.made)
        for place, tensor in enumerate(call.made, first):
            self._place[id(tensor)] = place
            self._results.add(id(tensor))
        return slice(first, len(self.memory))

    def free(self, tensors: Sequence[Tensor], last_use: Mapping[int, int], now: int) -> None:
        """The places of results that nobody reads behind call number now serve again."""
        for tensor in tensors:
            if id(tensor) in self._results and last_use.get(id(tensor), -1) <= now:
                self._results.remove(id(tensor))
                self._free.append(self._place[id(tensor)])

    def _taken(self, tensor: Tensor) -> int:
        if id(tensor) not in self._place:  # else it is an argument that the call wrote to
            self._results.add(id(tensor))
            if self._free:
                self._place[id(tensor)] = self._free.pop()
            else:
                self.memory.append(None)
                self._place[id(tensor)] = len(self.memory) - 1
        return self._place[id(tensor)]


Take = Callable[[list[Any]], Sequence[Any]]


def _spelled(call: _Call, places: _Places) -> tuple[Callable[..., Any], Take]:
    """What is called, and what finds its arguments."""
    fixed = {name: value for name, value in call.kwargs.items() if not _has_tensors(value)}
    named = [name for name in call.kwargs if name not in fixed]
    function: Callable[..., Any] = partial(call.operation, **fixed) if fixed else call.operation
    if named:
        function = _with_names(function, named)
    if call.is_collective:
        function = _awaited(function)
    values = [*call.args, *(call.kwargs[name] for name in named)]
    finders = [_finder(value, places) for value in values]
    if len(finders) > 1 and all(isinstance(finder, int) for finder in finders):
        return function, itemgetter(*finders)
    return function, lambda memory: [_found(finder, memory) for finder in finders]


def _with_names(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """function, the last of whose arguments have names."""

    def call(*args: Any) -> Any:
        return function(*args[: -len(names)], **dict(zip(names, args[-len(names) :], strict=True)))

    return call


def _awaited(function: Callable[..., Any]) -> Callable[..., None]:
    """function, a collective, and the wait for its end."""

    def call(*args: Any) -> None:
        *_, work = function(*args)
        Work.unbox(work).wait()

    return call


Finder = int | list[int]


def _finder(value: Any, places: _Places) -> Finder:
    """The place of a value, or of each in a list that has tensors."""
    if isinstance(value, (tuple, list)) and _has_tensors(value):
        return [places.of(one) for one in value]
    return places.of(value)


def _found(finder: Finder, memory: list[Any]) -> Any:
    return memory[finder] if isinstance(finder, int) else [memory[place] for place in finder]


def _has_tensors(value: Any) -> bool:
    return any(True for _ in _tensors_in([value]))


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_in(value)


def _memory_of(tensor: Tensor) -> int:
    memory: int = tensor.untyped_storage()._cdata
    return memory
