"""Alarms: a heap of the times at which the machine needs an event. Each alarm can be cancelled."""

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")

_SLACK = 64  # cancelled alarms that may stay in the heap, besides as many as are set


class Alarm(Generic[T]):
    """An alarm's time and owner."""

    __slots__ = ("at_ms", "number", "whose")

    def __init__(self, at_ms: int, number: int, whose: T) -> None:
        self.at_ms = at_ms
        self.number = number  # in the order in which alarms were set: equal times ring in this order
        self.whose: T | None = whose  # None: it has rung or was cancelled, and may stay in the heap for minutes

    def __lt__(self, other: "Alarm[T]") -> bool:
        return (self.at_ms, self.number) < (other.at_ms, other.number)


class Alarms(Generic[T]):
    """The alarms of one machine. Setting an alarm costs O(log n), cancelling one next to nothing."""

    __slots__ = ("_heap", "_number", "_off")

    def __init__(self) -> None:
        self._heap: list[Alarm[T]] = []
        self._number = 0
        self._off = 0  # cancelled ones in the heap

    def set(self, at_ms: int, whose: T) -> Alarm[T]:
        """Sets an alarm for `whose`, and returns it for `call_off`."""
        self._number += 1
        alarm = Alarm(at_ms, self._number, whose)
        heapq.heappush(self._heap, alarm)
        return alarm

    def call_off(self, alarm: Alarm[T]) -> None:
        """Cancels an alarm, unless it has rung."""
        if alarm.whose is None:
            return
        alarm.whose = None
        self._off += 1
        if self._off > _SLACK + len(self._heap) // 2:
            self._heap = [alarm for alarm in self._heap if alarm.whose is not None]
            heapq.heapify(self._heap)
            self._off = 0

    def earliest_ms(self) -> int | None:
        """Returns when the next alarm rings, or None if no alarm is set."""
        heap = self._heap
        while heap and heap[0].whose is None:
            heapq.heappop(heap)
            self._off -= 1
        return heap[0].at_ms if heap else None

    def ring(self, now_ms: int) -> T | None:
        """Removes the earliest alarm that is due and returns its owner, or None if no alarm is due."""
        due_ms = self.earliest_ms()
        if due_ms is None or due_ms > now_ms:
            return None
        alarm = heapq.heappop(self._heap)
        whose, alarm.whose = alarm.whose, None
        return whose

    def __len__(self) -> int:
        """Returns how many alarms are set, without cancelled ones."""
        return len(self._heap) - self._off
