"""A request to the engine, with its images and their rows, and the order in which requests start.

A request owns its rows: each of its `n` images has a conditional row and, under guidance, an
unconditional one. All of them start at the same pass. The two rows of an image are at the same
position ever after. Images may differ, and only the device knows their positions exactly.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine_config import SchedulingPolicy


class RequestState(StrEnum):
    """Where a request stands. The last three states are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False)
class RowState:
    """What the host knows about one sequence of the batch."""

    label: int  # class, or num_classes for an unconditional row
    slot: int  # of the image that it draws
    end: int  # position at which it leaves: where its image, or the image's guidance, ends
    # page k holds positions k * page_size and the next page_size - 1
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class ImageState:
    """What the host knows about one image of the batch.

    The next pass begins at a position of the image that is at least `position` and at most `limit`.
    With lookahead off both are equal between two spans. The device does not pass the limit, and the
    rows have pages for all positions below it.
    """

    params: SamplingParams
    image_index: int  # the draws' key beside the seed
    slot: int  # line of the codes buffer
    # in the batch: the conditional one, then the unconditional one; empty when the image has ended
    rows: list[RowState] = field(default_factory=list)
    position: int = 0  # tokens that it has at least, once the device has done what it was given
    limit: int = 0  # tokens that it has then at most


@dataclass(eq=False)
class Request:
    """One class label and how often to draw it. `Engine.submit` makes it, and only the engine's
    thread changes it.

    `codes` is set when the state is finished, `error` (one line) and `cause` when it is failed; the
    state is set last, so that a thread that sees the end sees the result.
    """

    id: int
    class_label: int
    params: SamplingParams
    first_image: int = 0  # image k of the request draws with (seed, first_image + k)
    client: str = ""  # whose it is; for the policy "fair"
    state: RequestState = RequestState.WAITING
    # in the batch, or waiting for their codes to arrive; empty until the request starts
    images: list[ImageState] = field(default_factory=list, repr=False)
    codes: Tensor | None = None  # int32 [n, tokens] on the CPU
    error: str | None = None
    cause: BaseException | None = None  # of a failure: what was raised, or a `NonFiniteLogitsError`
    # Set with the codes, over all images: guesses that were tried, and those of them that held.
    drafted: int = 0
    accepted: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the request."""
        return self.state in (RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED)

    @property
    def steps(self) -> int:
        """Tokens that each of its images has at least, once the device has done what it was
        given.
        """
        return min((image.position for image in self.images), default=0)

    @property
    def tokens(self) -> int:
        """Tokens that its images have at least, all together."""
        return sum(image.position for image in self.images)

    @property
    def passes(self) -> int:
        """Passes that its images took, all together, once the codes are there. A pass keeps one
        token of an image, and one more for each guess that held. So a pass of a finished request
        kept `tokens / passes` tokens of an image on average.
        """
        return self.tokens - self.accepted

    @property
    def rows(self) -> list[RowState]:
        """All rows that are still in the batch."""
        return [row for image in self.images for row in image.rows]

    @property
    def slots(self) -> list[int]:
        """The slots of its images, in their order."""
        return [image.slot for image in self.images]


@dataclass
class _Flow:
    """A client that waits."""

    deficit: int  # what it may still start in this turn
    requests: deque[Request] = field(default_factory=deque)


class RequestQueue:
    """The requests that wait. The scheduler starts the head, and nothing but the head; the head
    stays the same until it is taken out. The names are those of vLLM's request queues.

    The policy "fair" gives an equal share to each client that waits. Within a client, the first
    request starts first. This is deficit round robin (Shreedhar and Varghese, "Efficient Fair
    Queuing Using Deficit Round Robin", 1995). Clients take turns. In a turn a client starts
    requests worth one quantum, and what it did not use counts in its next turn. A client that has
    nothing left to start loses its turn and what it had saved, and begins behind all others when it
    comes back. So:

    - While two clients wait, what they start differs by at most one quantum and the cost of two
    requests.
    - Between two turns of a client each other client has one turn at most, also if new ones keep
    coming.
    - Nothing is remembered of a client that does not wait.

    The cost of a request is what it takes of the device: the sum of its rows over all its steps.
    The policy "fcfs" (first come, first served) takes all requests for those of one client.

    Args:
        tokens: per image. The quantum is the cost of a guided image, which is the dearest one.
    """

    def __init__(self, policy: SchedulingPolicy, tokens: int) -> None:
        self._fair, self._tokens, self._quantum = policy == "fair", tokens, 2 * tokens
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
        flow = self._flows.setdefault(self._client(request), _Flow(self._quantum))
        flow.requests.append(request)
        self._length += 1

    def peek_request(self) -> Request:
        """The oldest request of the client whose turn it is. The queue must not be empty. Turns
        that do not suffice for a request end here.
        """
        while True:
            client, flow = next(iter(self._flows.items()))
            if self.cost(flow.requests[0]) <= flow.deficit:
                return flow.requests[0]
            flow.deficit += self._quantum
            self._flows.move_to_end(client)

    def pop_request(self) -> Request:
        """Takes the head out, because it starts, and its cost from what its client may start."""
        request = self.peek_request()
        self._flows[self._client(request)].deficit -= self.cost(request)
        self.remove_request(request)
        return request

    def remove_request(self, request: Request) -> bool:
        """Takes a request out, wherever it is. Returns False if it is not here."""
        client = self._client(request)
        flow = self._flows.get(client)
        if flow is None or request not in flow.requests:
            return False
        flow.requests.remove(request)
        self._length -= 1
        if not flow.requests:
            del self._flows[client]
        return True

    def cost(self, request: Request) -> int:
        """The sum of a request's rows over all its steps."""
        params = request.params
        return params.n * (self._tokens + params.guided_steps(self._tokens))

    def _client(self, request: Request) -> str:
        return request.client if self._fair else ""
