"""Published figures of forward against backward language models. Numbers only, each with its source."""

# How much larger the backward loss is than the forward loss, in per cent, {context in tokens: gap}: Papadopoulos,
# Wenger and Hongler 2024, "Arrows of Time for Large Language Models"; separate models per direction.
ARROW_OF_TIME = {
    "English": {16: 0.07, 32: 0.18, 64: 0.48, 128: 0.84, 256: 0.90, 512: 1.02},
    "French": {16: 0.40, 32: 0.82, 64: 1.21, 128: 1.94, 256: 2.65, 512: 2.92},
}
