"""Tolerances of golden comparisons, each with its reason. Errors are relative, of the worst row that is compared."""

from __future__ import annotations

COMPUTE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""By the dtype in which an engine computes; both sides multiply by the same weights. In float32 only sums in another order
differ, which over tens of layers stays below 1e-4; a fault changes a row by 1e-2 and more. In float16 and bfloat16 activations
are rounded to 11 and 8 bits, some hundred times in a row."""

ROUNDED = 22.0
"""Factor on the relative error of what is rounded before a product, for what later layers make of it. Of inputs, which an
engine rounds (`WeightFormat.input_error`), it gives 0.2 for 8-bit integers and 0.57 for 8-bit floats. Of weights it is cut at
1, where nothing of the source is left; models of three to nine layers lose up to five times the error of their worst one."""

ROUNDED_BLOCKS = 9e-3
"""Relative error of inputs in blocks of 8-bit integers, with one scale each."""

PIXELS = 1e-2
"""Error of pixels where the engine resizes with the filter of the model's processor. Rounding to 255 levels gives 1e-3. Pillow
cuts values beyond black and white between its two passes, torchvision after both, which gives 6e-3 on a pattern of black and
white pixels; bilinear in place of bicubic is 3e-2."""

OTHER_FILTER = 2.5e-1
"""Error of pixels where the engine has another resize filter, and no choice of filters: edges are blurred."""

UNSEEN_PIXELS = 8e-3
"""What later stages may make of the pixels of an engine that does not show them, which is added to their tolerance: eight
times the rounding to 255 levels."""

STORED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By the dtype of unquantized weights: what they compute against the source's, both in float32. Rounding a weight once changes
it by at most 2^-25, 2^-12 and 2^-9, which adds up over tens of layers."""

LOG_PROBABILITY = 10.0
"""Factor on `COMPUTE` for absolute differences of log-probabilities, which are as large as logits: about ten."""

TIE = 4.0
"""Factor on `COMPUTE` below which the gap between the two most probable tokens, as a share of the logits' root mean square, is
none: either may be the greedy one."""
