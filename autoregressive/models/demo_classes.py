"""The 64 classes of the demo model, in the order of their ids: a name and the emoji that its
pictures were rendered from.

The first eight are kin of the eight ImageNet classes that LlamaGen shows: golden retriever, otter,
lesser panda, geyser, macaw, valley, balloon, arctic fox.
"""

DEMO_EMOJI: tuple[tuple[str, str], ...] = (
    ("dog", "🐶"), ("otter", "🦦"), ("panda", "🐼"), ("volcano", "🌋"),
    ("parrot", "🦜"), ("mountain", "🏔"), ("balloon", "🎈"), ("fox", "🦊"),
    ("cat", "🐱"), ("lion", "🦁"), ("tiger", "🐯"), ("bear", "🐻"),
    ("koala", "🐨"), ("pig", "🐷"), ("frog", "🐸"), ("monkey", "🐵"),
    ("penguin", "🐧"), ("owl", "🦉"), ("eagle", "🦅"), ("duck", "🦆"),
    ("flamingo", "🦩"), ("peacock", "🦚"), ("turtle", "🐢"), ("snake", "🐍"),
    ("lizard", "🦎"), ("crocodile", "🐊"), ("whale", "🐳"), ("dolphin", "🐬"),
    ("octopus", "🐙"), ("crab", "🦀"), ("lobster", "🦞"), ("butterfly", "🦋"),
    ("ladybug", "🐞"), ("bee", "🐝"), ("snail", "🐌"), ("elephant", "🐘"),
    ("giraffe", "🦒"), ("zebra", "🦓"), ("hedgehog", "🦔"), ("sunflower", "🌻"),
    ("rose", "🌹"), ("cactus", "🌵"), ("mushroom", "🍄"), ("apple", "🍎"),
    ("pineapple", "🍍"), ("strawberry", "🍓"), ("watermelon", "🍉"), ("avocado", "🥑"),
    ("carrot", "🥕"), ("pizza", "🍕"), ("hamburger", "🍔"), ("cake", "🎂"),
    ("rocket", "🚀"), ("car", "🚗"), ("sailboat", "⛵"), ("bicycle", "🚲"),
    ("house", "🏠"), ("guitar", "🎸"), ("umbrella", "☔"), ("snowman", "⛄"),
    ("crown", "👑"), ("trophy", "🏆"), ("soccer ball", "⚽"), ("camera", "📷"),
)  # fmt: skip
