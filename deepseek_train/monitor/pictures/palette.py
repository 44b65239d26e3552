"""The colours of kinds of work, as in the V3 report's figure 5: orange, green, teal, blue."""

from deepseek_train.schedule.action import Kind

IDLE = "#e9eaee"
# per kind: the direction that starts on the first rank, the one that starts on the last
COLOURS = {
    Kind.FORWARD: ("#fdd09a", "#ea8a2c"),
    Kind.BACKWARD: ("#b9dfa6", "#4f9d45"),
    Kind.BACKWARD_INPUT: ("#a6e0d6", "#23907f"),
    Kind.BACKWARD_WEIGHT: ("#b3d0f5", "#3a73c4"),
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward for inputs",
    Kind.BACKWARD_WEIGHT: "backward for weights",
}
