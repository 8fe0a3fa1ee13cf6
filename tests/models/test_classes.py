"""Class names: asked for by id or name, never silently another class."""

import pytest

from autoregressive.cli.command import flag_of
from autoregressive.errors import UserError
from autoregressive.models.classes import DEMO, IMAGENET, ClassNames, numbered_classes
from autoregressive.models.defaults import DEMO_DEFAULTS, LLAMAGEN_DEFAULTS


def test_llamagens_eight_are_the_classes_that_it_means() -> None:
    """Fails if the thousand names are in another order than ImageNet's ids."""
    expected = [
        "golden retriever",
        "otter",
        "lesser panda",
        "geyser",
        "macaw",
        "valley",
        "balloon",
        "Arctic fox",
    ]
    assert [IMAGENET[label] for label in LLAMAGEN_DEFAULTS.class_labels] == expected
    assert len(IMAGENET) == 1000


def test_the_names_are_torchvisions() -> None:
    """Fails if a name or its place differs from the list that the names were copied from."""
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    assert list(IMAGENET.names) == models.ResNet18_Weights.DEFAULT.meta["categories"]


def test_the_demo_starts_with_their_kin() -> None:
    """Fails if the demo model's default labels point at other classes than intended."""
    expected = ["dog", "otter", "panda", "volcano", "parrot", "mountain", "balloon", "fox"]
    assert [DEMO[label] for label in DEMO_DEFAULTS.class_labels] == expected
    assert len(DEMO) == 64


@pytest.mark.parametrize("classes", [IMAGENET, DEMO])
def test_every_class_is_reached_by_its_exact_name_and_its_id(classes: ClassNames) -> None:
    """Fails if two classes share a spelling, so that one of them cannot be asked for by name."""
    for label in range(len(classes)):
        assert classes.resolve(classes[label]) == label
        assert classes.resolve(str(label)) == label


@pytest.mark.parametrize(
    "typed",
    ["golden retriever", "GOLDEN Retriever", " golden  retriever ", "golden_retriever", "207"],
)
def test_case_spaces_and_underscores_do_not_matter(typed: str) -> None:
    """Fails if a natural spelling is refused."""
    assert IMAGENET.resolve(typed) == 207


def test_a_name_that_two_classes_bear_is_decided_by_exact_spelling_or_refused() -> None:
    """Fails if the dog is drawn for whom wanted the garment, or the reverse."""
    assert IMAGENET.resolve("Cardigan") == 264
    assert IMAGENET.resolve("cardigan") == 474
    with pytest.raises(UserError, match=r"Cardigan \(264\), cardigan \(474\)"):
        IMAGENET.resolve("CARDIGAN")


def test_a_sentence_is_answered_with_the_names_in_it() -> None:
    """Fails if a class that the words name is not among those suggested."""
    with pytest.raises(UserError, match=r"closest are red fox \(277\)"):
        IMAGENET.resolve("a red fox in snow")
    with pytest.raises(UserError, match="is empty"):
        IMAGENET.resolve("  ")


def test_a_near_miss_suggests_the_closest_three() -> None:
    """Fails if the error does not help, or suggests another number of names."""
    with pytest.raises(UserError, match="golden retriever") as caught:
        IMAGENET.resolve("golden retreiver")
    assert str(caught.value).count("(") == 3  # the ids
    assert caught.value.spelled(flag_of).endswith(" (see --list-classes)")


@pytest.mark.parametrize("typed", ["1000", "-1", "99999999999999999999", "9" * 5000])
def test_ids_beyond_the_data_set_are_refused(typed: str) -> None:
    """Fails if an id could index past the embedding table, or the row for "no class"."""
    with pytest.raises(UserError, match="0 to 999"):
        IMAGENET.resolve(typed)


def test_the_listing_is_filtered_by_word_in_any_case() -> None:
    """Fails if --list-classes hides a match or shows a class without the word."""
    assert IMAGENET.listing("ARCTIC").splitlines() == [" 279  Arctic fox"]
    assert len(IMAGENET.listing().splitlines()) == 1000
    with pytest.raises(UserError, match="closest"):
        IMAGENET.listing("xyzzy")


def test_a_data_set_without_known_names_takes_ids() -> None:
    """Fails if a model of another number of classes cannot be asked for anything."""
    classes = numbered_classes(10)
    assert classes.resolve("9") == 9
    with pytest.raises(UserError, match="0 to 9"):
        classes.resolve("10")
