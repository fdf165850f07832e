"""The colours of every picture, fixed in one place.

The hues are those of Okabe and Ito, "Color Universal Design" (2008): they stay apart under the common kinds of
colour blindness. They lie in the middle of the lightness range, so one set serves light and dark pages; text is
never coloured with them.
"""

from __future__ import annotations

from samegrad.records import Category, Phase

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILION, PINK, GREY = "#E69F00", "#D55E00", "#CC79A7", "#8C8C8C"
# Darker than GREY, which a green-blind eye takes for GREEN.
SLATE = "#565D66"
# Lighter than all of them: stays apart from each, whichever of them lies beside it.
SILVER = "#C9CED6"

# From the bottom of a stack to its top: what stays for the whole step lies below what comes and goes.
CATEGORY_COLOUR = {
    Category.PARAMETERS: BLUE,
    Category.GRADIENTS: SKY,
    Category.OPTIMIZER_STATE: GREEN,
    Category.BUFFERS: SLATE,
    Category.WORKSPACES: SILVER,
    Category.INPUTS: YELLOW,
    Category.ACTIVATIONS: ORANGE,
    Category.TEMPORARY: PINK,
}

# Phases are bands of the text's own colour, so that they never compete with the categories.
PHASE_OPACITY = {
    Phase.FORWARD: 0.07,
    Phase.LOSS: 0.30,
    Phase.BACKWARD: 0.15,
    Phase.HANDOFF: 0.40,
    Phase.OPTIMIZER: 0.22,
}

SERIES_COLOUR = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION)
OVER_BUDGET = VERMILION
