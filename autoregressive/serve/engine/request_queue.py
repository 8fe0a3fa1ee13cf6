"""The order in which waiting requests start. The scheduler starts the head of one of these queues,
and nothing but the head.

The names are those of vLLM's request queues.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Protocol

from autoregressive.serve.engine.config import SchedulingPolicy
from autoregressive.serve.engine.request import Request


class RequestQueue(Protocol):
    """What the scheduler needs of a queue. The head stays the same until it is taken out."""

    def __len__(self) -> int:
        """How many requests wait."""

    def add_request(self, request: Request) -> None:
        """Puts a request behind those of the same client."""

    def peek_request(self) -> Request:
        """The request that is to start next. The queue must not be empty."""

    def pop_request(self) -> Request:
        """Takes the head out, because it starts."""

    def remove_request(self, request: Request) -> bool:
        """Takes a request out, because it is cancelled. Returns False if it is not here."""


class FCFSRequestQueue(deque[Request]):
    """First come, first served."""

    def add_request(self, request: Request) -> None:
        """Adds a request behind all others."""
        self.append(request)

    def peek_request(self) -> Request:
        """The request that came first."""
        return self[0]

    def pop_request(self) -> Request:
        """Takes out the request that came first."""
        return self.popleft()

    def remove_request(self, request: Request) -> bool:
        """Takes a request out, wherever it is. Returns False if it is not here."""
        if request not in self:
            return False
        self.remove(request)
        return True


@dataclass
class _Flow:
    """A client that waits."""

    deficit: int  # what it may still start in this turn
    requests: deque[Request] = field(default_factory=deque)


class FairRequestQueue:
    """Gives an equal share to each client that waits. Within a client, the first request starts
    first.

    This is deficit round robin (Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round
    Robin", 1995). Clients take turns. In a turn a client starts requests worth one quantum, and
    what it did not use counts in its next turn. A client that has nothing left to start loses its
    turn and what it had saved, and begins behind all others when it comes back. So:

    - While two clients wait, what they start differs by at most one quantum and the cost of two
    requests.
    - Between two turns of a client each other client has one turn at most, also if new ones keep
    coming.
    - Nothing is remembered of a client that does not wait.

    The cost of a request is what it takes of the device: the sum of its rows over all its steps.

    Args:
        tokens: per image. The quantum is the cost of a guided image, which is the dearest one.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens, self._quantum = tokens, 2 * tokens
        # by client, in the order of their turns
        self._flows: OrderedDict[str, _Flow] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        """How many requests wait."""
        return self._length

    def add_request(self, request: Request) -> None:
        """Adds a request behind those of its client. A client that did not wait has its turn after
        all others.
        """
        if request.client not in self._flows:
            self._flows[request.client] = _Flow(self._quantum)
        self._flows[request.client].requests.append(request)
        self._length += 1

    def peek_request(self) -> Request:
        """The oldest request of the client whose turn it is. Turns that do not suffice for a
        request end here.
        """
        while True:
            client, flow = next(iter(self._flows.items()))
            if self.cost(flow.requests[0]) <= flow.deficit:
                return flow.requests[0]
            flow.deficit += self._quantum
            self._flows.move_to_end(client)

    def pop_request(self) -> Request:
        """Takes the head out, and its cost from what its client may start."""
        request = self.peek_request()
        self._flows[request.client].deficit -= self.cost(request)
        self.remove_request(request)
        return request

    def remove_request(self, request: Request) -> bool:
        """Takes a request out, wherever it is. Returns False if it is not here."""
        flow = self._flows.get(request.client)
        if flow is None or request not in flow.requests:
            return False
        flow.requests.remove(request)
        self._length -= 1
        if not flow.requests:
            del self._flows[request.client]
        return True

    def cost(self, request: Request) -> int:
        """The sum of a request's rows over all its steps."""
        params = request.params
        return params.n * (self._tokens + params.guided_steps(self._tokens))


def create_request_queue(policy: SchedulingPolicy, tokens: int) -> RequestQueue:
    """The queue of a policy, for images of so many tokens."""
    match policy:
        case "fcfs":
            return FCFSRequestQueue()
        case "fair":
            return FairRequestQueue(tokens)
