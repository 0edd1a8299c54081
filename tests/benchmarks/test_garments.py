"""Images of coloured garments with captions."""

import composites
import numpy as np
import pupils
import pytest
import recogniser


def scenes(held_out: bool, number: int = 300) -> list[composites.Scene]:
    return [composites.scene(np.random.default_rng((held_out, i)), held_out) for i in range(number)]


def combinations(scene: composites.Scene) -> set[tuple[int, int]]:
    return {(garment.kind, garment.colour) for garment in scene.garments}


def test_combinations_are_held_out_altogether():
    assert not any(combinations(scene) & composites.HELD_OUT for scene in scenes(False))
    assert all(combinations(scene) & composites.HELD_OUT for scene in scenes(True))
    # Each garment and each colour has one of them, so that both are known from others.
    assert [{*values} for values in zip(*composites.HELD_OUT, strict=True)] == [{*range(10)}] * 2


def test_a_caption_says_what_is_in_the_image():
    for scene in scenes(False):
        words = scene.caption.split()
        for garment in scene.garments:
            assert [*composites.COLOURS][garment.colour] in words
            assert composites.GARMENTS[garment.kind] in scene.caption
            assert not garment.said or composites.PATTERNS[garment.pattern] in words
        assert scene.caption.endswith(f"{[*composites.BACKGROUNDS][scene.background]} background")
        assert (scene.place in scene.caption) >= scene.said
    orange = composites.Garment(9, 4, 1, False)
    assert composites.Scene((orange,), "at the top", True, 0).caption == (
        "an orange ankle boot at the top on a white background"
    )
    striped = composites.Garment(0, 3, 1, True)
    assert composites.Scene((striped, orange), "above", False, 2).caption == (
        "a striped red t-shirt and an orange ankle boot on a red background"
    )


@pytest.mark.parametrize("place", [*composites.PLACES, *composites.RELATIONS])
def test_garments_are_drawn_in_their_colours_at_their_places(place):
    crop = np.zeros((28, 28), np.uint8)
    crop[4:24, 6:22] = 220
    colours = (3, 7) if place in composites.RELATIONS else (3,)
    garments = tuple(composites.Garment(0, colour, 0, True) for colour in colours)
    scene = composites.Scene(garments, place, True, 6)
    image = composites.render(scene, np.random.default_rng(0), [crop[None]])
    np.testing.assert_array_equal(image, composites.render(scene, np.random.default_rng(0), [crop[None]]))
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    centres = composites.RELATIONS.get(place) or (composites.PLACES[place],)
    for colour, (x, y) in zip(colours, centres, strict=True):
        # The garment in front covers the other one's middle.
        if place == "in front of" and colour == colours[1]:
            x, y = x + 7, y - 7
        seen = image[max(0, y - 3) : y + 3, max(0, x - 3) : x + 3].reshape(-1, 3).mean(0)
        distances = [np.abs(seen - np.array(value)).sum() for value in composites.COLOURS.values()]
        assert int(np.argmin(distances)) == colour


def truth(scene: composites.Scene) -> list[int]:
    """Numbers of `recogniser.HEADS` for an image of a scene."""
    row = {
        "garments": [composites.GARMENTS[garment.kind] for garment in scene.garments],
        "colours": [[*composites.COLOURS][garment.colour] for garment in scene.garments],
        "patterns": [composites.PATTERNS[garment.pattern] for garment in scene.garments],
        "place": scene.place,
        "background": [*composites.BACKGROUNDS][scene.background],
    }
    return recogniser.targets([scene.caption], [row])[0].tolist()


def test_what_a_caption_says_is_in_its_image():
    for scene in (*scenes(False), *scenes(True)):
        right = recogniser.Said.of(scene.caption).right(truth(scene))
        assert all(right)
        assert len(right) == 1 + scene.said + sum(2 + garment.said for garment in scene.garments)


def test_pupils_learn_what_captions_say():
    for scene in scenes(False):
        told = pupils.told([scene.caption])[0].tolist()
        assert all(said in (-100, value) for said, value in zip(told, truth(scene), strict=True))
        ordered = scene.said or len(scene.garments) == 1
        items = sum(2 + garment.said for garment in scene.garments) if ordered else 0
        assert sum(said != -100 for said in told) == 1 + scene.said + items


@pytest.mark.parametrize(
    ("caption", "other", "right"),
    [
        # Another relation says the same of the image.
        ("a red bag to the left of a blue coat on a pink background", ("to the right of", 1), 6),
        ("a red bag below a blue coat on a pink background", ("above", 1), 6),
        # The garments are in each other's place.
        ("a red bag to the left of a blue coat on a pink background", ("to the right of", 0), 2),
        ("a red bag to the left of a blue coat on a pink background", ("above", 0), 5),
        # Either order is right where none is said.
        ("a red bag and a blue coat on a pink background", ("above", 1), 5),
        ("a striped red bag and a blue coat on a pink background", ("above", 1), 5),
    ],
)
def test_attributes_are_counted_where_they_are_said(caption, other, right):
    """The image has a plain red bag and a plain blue coat, in a relation and an order."""
    relation, swapped = other
    bag, coat = composites.Garment(8, 3, 0, False), composites.Garment(4, 7, 0, False)
    scene = composites.Scene((coat, bag) if swapped else (bag, coat), relation, True, 7)
    assert sum(recogniser.Said.of(caption).right(truth(scene))) == right


def test_recall_is_the_share_of_reality_that_is_covered():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 4))
    assert recogniser.recall(real, rng.normal(size=(400, 4))) > 0.9
    half = rng.normal(size=(800, 4))
    assert recogniser.recall(real, half[half[:, 0] > 0]) == pytest.approx(0.6, abs=0.1)
    assert recogniser.recall(real, real + 100) == 0
