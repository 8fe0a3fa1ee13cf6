"""Which operation each kernel of a step belongs to, and how long it takes: the arithmetic of
profile_step.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autoregressive.errors import UserError
from autoregressive.serve.floor import Floor, product_elements

# As `floor.products` lists them.
PRODUCTS = ("qkv product", "output product", "swiglu", "down product", "head")
# In the order of a step. Where a library does the products of many rows, `swiglu` is the product
# and `gate` what follows it.
_ATTENTION_HALF = ("embed", "qkv product", "attention", "combine", "output product", "add_norm")
ORDER = (*_ATTENTION_HALF, "swiglu", "gate", "down product", "head", "draw")

_KERNELS = {
    f"_{name}_kernel": name
    for name in ("embed", "attention", "combine", "add_norm", "swiglu", "gate", "draw")
}
_KERNELS |= {"_hopper_attention_kernel": "attention", "_fused_swiglu_kernel": "swiglu"}
_ADDS_ITSELF = "_fused_project_kernel"  # a product without an `add_norm` after it
# Every other kernel is of a product: the one that is due after these. After `add_norm` it depends
# on the product before.
_NEXT_PRODUCT = {"embed": "qkv product", "attention": "output product", "combine": "output product"}
_NEXT_PRODUCT |= {"swiglu": "down product", "gate": "down product"}


@dataclass(frozen=True)
class Kernel:
    """One launch, as a profiler saw it."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class OperationTime:
    """All launches of an operation, for one step."""

    operation: str
    launches: float
    busy_us: float  # from start to end
    # from the end of the kernel before to the own end; None: nothing overlaps
    adds_us: float | None
    # that must come from memory; None: none but activations, which stay in the cache
    bytes: int | None = None
    floor_us: float | None = None

    @property
    def mean_us(self) -> float:
        """Microseconds that one launch is busy."""
        return self.busy_us / self.launches

    @property
    def share(self) -> float | None:
        """The floor divided by the operation's time; None without a floor."""
        return (
            None
            if self.floor_us is None
            else self.floor_us / (self.busy_us if self.adds_us is None else self.adds_us)
        )

    def line(self) -> str:
        """The line of the table."""
        adds = "-" if self.adds_us is None else f"{self.adds_us:.2f}"
        megabytes = "-" if self.bytes is None else f"{self.bytes / 1e6:.2f}"
        floor = "-" if self.floor_us is None else f"{self.floor_us:.2f}"
        share = "-" if self.share is None else f"{self.share:.1%}"
        times = f"{self.launches:>8.4g} {self.busy_us:>10.2f} {self.mean_us:>9.2f} {adds:>10}"
        return f"{self.operation:<15} {times} {megabytes:>9} {floor:>9} {share:>7}"


HEADER = (
    f"{'operation':<15} {'launches':>8} {'busy us':>10} {'mean us':>9} {'adds us':>10} "
    f"{'MB':>9} {'floor us':>9} {'share':>7}"
)


def operations_of(names: Iterable[str], layers: int) -> list[str]:
    """Which operation each kernel is of, by its name and by what came before.

    Args:
        names: kernels in the order of their starts, from the beginning of a step.
        layers: of the model.
    """
    found: list[str] = []
    due, last_product, layer = "qkv product", "", 0
    for name in names:
        own = next(
            (operation for kernel, operation in _KERNELS.items() if name.startswith(kernel)), None
        )
        operation = own or due
        found.append(operation)
        if operation in PRODUCTS:
            last_product = operation
        if operation == "embed":
            layer = 0
        if operation == "add_norm" and last_product == "output product":
            due = "swiglu"
        elif operation == "add_norm" or (
            operation == "down product" and name.startswith(_ADDS_ITSELF)
        ):
            layer += 1
            due = "qkv product" if layer < layers else "head"
        elif own is not None:
            due = _NEXT_PRODUCT.get(own, due)
    return found


def summed(kernels: Sequence[Kernel], layers: int, steps: int) -> list[OperationTime]:
    """Times for one step of each operation, in the order of a step.

    Args:
        kernels: all of `steps` steps, in any order.

    Raises:
        UserError: the kernels are not those of so many steps.
    """
    kernels = sorted(kernels, key=lambda kernel: (kernel.start_us, kernel.end_us))
    labels = operations_of((kernel.name for kernel in kernels), layers)
    seen = labels.count("embed")
    if seen != steps or labels.count("draw") != steps:
        raise UserError(
            f"the profiler saw {seen} of {steps} steps: try again, or with --enforce-eager"
        )
    launches, busy, adds = (dict.fromkeys(ORDER, 0.0) for _ in range(3))
    end_us = kernels[0].start_us
    for label, kernel in zip(labels, kernels, strict=True):
        launches[label] += 1 / steps
        busy[label] += (kernel.end_us - kernel.start_us) / steps
        adds[label] += max(0.0, kernel.end_us - end_us) / steps
        end_us = max(end_us, kernel.end_us)
    return [
        OperationTime(label, launches[label], busy[label], adds[label])
        for label in ORDER
        if launches[label]
    ]


def with_floor(
    times: list[OperationTime], floor: Floor, rows: int, context: float
) -> list[OperationTime]:
    """Adds each operation's bytes and its memory floor.

    Args:
        context: tokens that a row attends to.
    """
    kv_bytes = round(rows * context * floor.kv_bytes_per_token)
    known = {"attention": (kv_bytes, kv_bytes / floor.ceilings.read_bytes_per_second)}
    for name, elements in zip(PRODUCTS, product_elements(floor.config), strict=True):
        known[name] = (elements * floor.element_bytes, floor.product_seconds(elements, rows))
    return [
        replace(each, bytes=known[each.operation][0], floor_us=known[each.operation][1] * 1e6)
        if each.operation in known
        else each
        for each in times
    ]
