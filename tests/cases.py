"""The inputs that must work, by name, each with the reason for it.

A case builds a :class:`Sample` for a dtype and a device. Sizes are small, because Triton's interpreter runs them too:
V = 97 and 203 are below any tile and no multiple of a vector, 1500 is more than one tile and no multiple of one.
"""

from __future__ import annotations

import torch

from sample import CASES, IGNORE, INF, NAN, WIDE, Sample, case, labels, normal, of_plain, of_shape, plain

__all__ = ["CASES"]


# ---- 1. nothing, one, all masked ------------------------------------------------------------------------------------

of_plain("zero_rows", "no rows at all, in the shape of a flat batch", rows=0)
of_shape("zero_sequences", "a batch of no sequences", (0, 3, 97))
of_shape("zero_length", "sequences without tokens", (2, 0, 97))
of_plain("zero_rows_temperature", "no rows and one temperature per row", rows=0, temperature=torch.empty(0))
of_plain("one_token", "one token", rows=1)


@case("every token ignored; the rows hold NaN, which must not matter")
def all_ignored(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device)
    sample.logits.fill_(NAN)
    sample.target.fill_(IGNORE)
    return sample


@case("one valid token among ignored ones that hold inf")
def one_valid(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device)
    sample.target[[0, 1, 3, 4]] = IGNORE
    sample.logits[[0, 1, 3, 4]] = INF
    return sample


@case("a fully masked sequence, and ragged ends, in a batch")
def masked_sequences(dtype: torch.dtype, device: str) -> Sample:
    logits, target = normal(3, 3, 97, dtype=dtype, device=device), labels(3, 3, vocab=97, device=device)
    target[1], target[2, 1:] = IGNORE, IGNORE
    logits[1], logits[2, 1:] = NAN, -INF
    return Sample(logits, target)


# ---- 6. -inf, +inf, NaN ---------------------------------------------------------------------------------------------


@case("half of the vocabulary masked with -inf (top-k or grammar sampling)")
def masked_vocabulary(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, vocab=203)
    sample.logits[:, ::2] = -INF
    sample.target |= 1
    return sample


@case("whole tiles of -inf before, between and after the finite ones: a part's maximum is -inf")
def masked_tiles(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=4, vocab=9000)
    sample.logits[0, :8500] = -INF
    sample.logits[1, 100:] = -INF
    sample.logits[2, 10:8990] = -INF
    sample.logits[3, torch.arange(9000, device=device) != 4500] = -INF
    sample.target.copy_(torch.tensor([8999, 3, 8995, 4500]))
    return sample


@case("all -inf but one: H is 0 exactly, with the label on it and beside it")
def one_finite(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=4)
    keep = torch.tensor([0, 40, 96, 96], device=device)
    values = torch.tensor([0.0, 5.0, -1000.0, 7.0], dtype=dtype, device=device)
    sample.logits.fill_(-INF).scatter_(1, keep[:, None], values[:, None])
    sample.target.copy_(torch.tensor([0, 40, 96, 5]))
    return sample


@case("label on a -inf entry: logprob -inf, the rest finite, the gradient g/T at the label")
def label_impossible(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, temperature=0.7)
    sample.logits.scatter_(1, sample.target[:, None], -INF)
    return sample


@case(
    "a row of -inf, of NaN, with one NaN, with NaN at the label, with one +inf, two +inf, -inf and NaN: NaN there only"
)
def poisoned_rows(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=11)
    sample.target.fill_(50)
    sample.logits[1] = -INF
    sample.logits[2] = NAN
    sample.logits[3, 96] = NAN
    sample.logits[4, 50] = NAN
    sample.logits[5, 0] = INF
    sample.logits[6, [3, 90]] = INF
    sample.logits[7, 50] = INF
    sample.logits[8] = -INF
    sample.logits[8, 7] = NAN
    sample.logits[9, 1:] = -INF
    sample.logits[9, 0] = INF
    return sample


@case("NaN and +inf in the second tile only, and in the first only")
def poisoned_tiles(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=5, vocab=9000)
    sample.logits[0, 8999] = NAN
    sample.logits[1, 8999] = INF
    sample.logits[2, 0] = NAN
    sample.logits[3, 0] = INF
    return sample


@case("masking by the dtype's lowest number instead of -inf, under a temperature that overflows it", numeric=True)
def masked_by_lowest(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, temperature=0.25)
    sample.logits[:, 10:90] = torch.finfo(dtype).min
    sample.target.copy_(torch.tensor([0, 9, 96, 93, 5]))
    return sample


@case("a row of the dtype's lowest number is uniform; the label on a lowest entry stays finite", numeric=True)
def lowest_everywhere(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=3)
    sample.logits[0] = torch.finfo(dtype).min
    sample.logits[1, 1:] = torch.finfo(dtype).min
    return sample


# ---- 7. magnitudes --------------------------------------------------------------------------------------------------


@case("row maxima at +1000 and -1000", numeric=True)
def offset(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=6)
    shift = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0, 0.0, 300.0], dtype=dtype, device=device)
    sample.logits += shift[:, None]
    return sample


@case("offsets under a temperature that is no power of two: scaling before the subtraction rounds", numeric=True)
def offset_tempered(dtype: torch.dtype, device: str) -> Sample:
    sample = offset(dtype, device)
    sample.kwargs["temperature"] = 0.7
    return sample


@case("fp16's largest and lowest number, one such row, both in one row", numeric=True)
def largest_fp16(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=4)
    sample.logits[0, 5] = 65504
    sample.logits[1] = 65504
    sample.logits[2, 5] = -65504
    sample.logits[3, ::2], sample.logits[3, 1::2] = 65504, -65504
    return sample


@case("the dtype's largest and lowest number in one row: their difference overflows", numeric=True)
def largest_both(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=3)
    big = torch.finfo(dtype).max
    sample.logits[0, 3], sample.logits[0, 4] = big, -big
    sample.logits[1, ::2], sample.logits[1, 1::2] = big, -big
    sample.target[0] = 3
    sample.target[1] = 2
    return sample


@case(
    "a nearly deterministic policy: H of 1e-3 to 1e-20, where nothing may cancel; the label on the mode and off it",
    numeric=True,
)
def confident(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=8)
    sample.logits.clamp_(-4, 4)
    top = torch.tensor([10.0, 15, 20, 25, 30, 50, 25, 50], dtype=dtype, device=device)
    sample.logits[:, 50] = top
    sample.target[:6] = 50
    sample.target[6:] = 3
    return sample


@case("logprob of -200: the gradient at the label is still 1/T", numeric=True)
def improbable_label(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=2)
    sample.logits.scatter_(1, sample.target[:, None], -200.0)
    return sample


@case("ties: a constant row, two and three equal maxima", numeric=True)
def ties(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=3)
    sample.logits[0] = 1.5
    sample.logits[1, [3, 80]] = 20.0
    sample.logits[2, [0, 50, 96]] = 40.0
    sample.target.copy_(torch.tensor([96, 80, 1]))
    return sample


@case("a maximum that grows in every tile, and one that falls: every merge rescales", numeric=True)
def monotone(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=2, vocab=9000)
    ramp = torch.linspace(-40, 40, 9000, device=device)
    sample.logits.mul_(0.1).add_(torch.stack([ramp, -ramp]).to(dtype))
    return sample


@case("-0.0 and 0.0 tie", numeric=True)
def signed_zero(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=2)
    sample.logits[0] = -0.0
    sample.logits[1, ::2], sample.logits[1, 1::2] = 0.0, -0.0
    return sample


# ---- 9. labels ------------------------------------------------------------------------------------------------------


@case("int32 labels, at the first and the last column")
def int32_labels(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, vocab=203)
    target = sample.target.int()
    target[0], target[1], target[2] = 0, 202, IGNORE
    return Sample(sample.logits, target)


@case("an ignore_index that is a token id")
def ignore_token(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, ignore_index=7)
    sample.target[1] = 7
    sample.logits[1, 7] = NAN
    return sample


@case("an ignore_index beyond the vocabulary")
def ignore_beyond(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, ignore_index=100_000)
    sample.target[[0, 3]] = 100_000
    return sample


@case("labels that are a column of a wider matrix, so not contiguous")
def strided_labels(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=6)
    wide = torch.full((6, 3), 10_000_000, device=device)
    wide[:, 1] = sample.target
    return Sample(sample.logits, wide[:, 1])


@case("one label expanded over the rows (stride 0)")
def expanded_labels(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=4)
    return Sample(sample.logits, torch.tensor(11, device=device).expand(4))


# ---- 10. layouts ----------------------------------------------------------------------------------------------------

of_shape("one_dimension", "one row without a batch dimension: 0-d outputs", (97,))
three_dimensions = of_shape("three_dimensions", "(B, L, V)", (2, 3, 97))
of_shape("four_dimensions", "(A, B, L, V)", (2, 1, 3, 97))
of_shape(
    "four_dimensions_permuted",
    "(A, B, L, V) whose leading dimensions cannot be flattened without a copy",
    (2, 2, 2, 97),
    lambda z: z.permute(1, 2, 0, 3),
)
of_shape(
    "sliced_length",
    "the response part of a (B, L, V) batch, shifted by one: logits[:, p-1:-1]",
    (2, 6, 97),
    lambda z: z[:, 2:-1],
)


@case("the first V columns of a padded vocabulary: row stride != V")
def sliced_vocabulary(dtype: torch.dtype, device: str) -> Sample:
    logits = normal(4, 128, dtype=dtype, device=device)
    logits[:, 101:] = NAN  # whoever reads past the view sees it
    return Sample(logits[:, :101], labels(4, vocab=101, device=device))


@case("columns from an odd offset: base pointer and every row misaligned")
def misaligned(dtype: torch.dtype, device: str) -> Sample:
    logits = normal(4, 205, dtype=dtype, device=device)
    logits[:, 0], logits[:, 202:] = NAN, NAN
    return Sample(logits[:, 1:202], labels(4, vocab=201, device=device))


of_shape(
    "misaligned_flat",
    "contiguous rows from an odd element of the storage",
    (3 * 203 + 3,),
    lambda z: z[3:].view(3, 203),
)
of_shape(
    "transposed_batch",
    "time-major logits seen batch-major: (L, B, V).transpose(0, 1)",
    (3, 2, 97),
    lambda z: z.transpose(0, 1),
)
of_shape("transposed_vocabulary", "vocabulary-major logits: the last stride is not 1", (203, 5), lambda z: z.t())
of_shape("strided_columns", "every second column, in three dimensions", (2, 3, 194), lambda z: z[..., ::2])
of_shape("strided_rows", "every second row and sequence", (4, 6, 97), lambda z: z[::2, 1::2])
of_shape(
    "expanded_rows",
    "one row expanded over the batch (stride 0): reads alias, the gradient must not",
    (1, 97),
    lambda z: z.expand(4, 97),
)
of_shape(
    "expanded_columns",
    "one value expanded over the vocabulary (last stride 0): uniform",
    (4, 1),
    lambda z: z.expand(4, 97),
)


# ---- 11. temperature, softcap ---------------------------------------------------------------------------------------

of_plain("temperature_low", "temperature below 1", temperature=0.3)
of_plain("temperature_int", "temperature above 1, a Python int", temperature=2)
of_plain(
    "temperature_scalar_tensor",
    "temperature as a 0-d tensor of another dtype",
    temperature=torch.tensor(1.25, dtype=torch.float64),
)
temperature_per_token = of_plain(
    "temperature_per_token", "one temperature per token", temperature=torch.tensor([0.5, 1.0, 2.0, 0.1, 10.0])
)


@case("one temperature per sequence, (B, 1) against a target of (B, L)")
def temperature_per_sequence(dtype: torch.dtype, device: str) -> Sample:
    sample = three_dimensions(dtype, device)
    sample.kwargs["temperature"] = torch.tensor([[0.5], [1.7]], device=device)
    return sample


@case("one temperature per position, (L,) against (B, L), as a strided view")
def temperature_per_position(dtype: torch.dtype, device: str) -> Sample:
    sample = three_dimensions(dtype, device)
    sample.kwargs["temperature"] = torch.tensor([0.5, NAN, 1.0, NAN, 3.0, NAN], device=device)[::2]
    return sample


of_plain("temperature_tiny", "tiny temperature: greedy, the gradient vanishes or is large", temperature=1e-3)
of_plain("temperature_tinier", "1e-6: differences of logits overflow exp's range by far", WIDE, temperature=1e-6)
of_plain("temperature_tiniest", "1e-30: (z - m) / T overflows fp32 itself", WIDE, temperature=1e-30)
of_plain("temperature_large", "a large temperature: uniform", temperature=1e4)


@case("an ignored token may have any temperature > 0, and the others keep theirs")
def temperature_with_ignored(dtype: torch.dtype, device: str) -> Sample:
    sample = temperature_per_token(dtype, device)
    sample.target[[1, 3]] = IGNORE
    return sample


@case("softcap of 30 (Gemma) on logits up to about 60")
def softcap(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, vocab=203, softcap=30.0)
    sample.logits *= 6
    return sample


of_plain(
    "softcap_tempered", "softcap under a temperature", softcap=5.0, temperature=torch.tensor([0.5, 0.7, 1.0, 1.5, 3.0])
)


@case("a softcap that saturates: logits far beyond it, infinite ones included (tanh(-inf) = -1 is a finite logit)")
def softcap_saturated(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=4, softcap=2.0)
    sample.logits *= 10
    sample.logits[1, :50] = -INF
    sample.logits[2, 3] = 60000.0
    sample.logits[3] = 1e-4 * sample.logits[3]
    return sample


@case("NaN under a softcap is NaN")
def softcap_poisoned(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, rows=3, softcap=2.0)
    sample.logits[1, 60] = NAN
    return sample


# ---- 8. vocabulary --------------------------------------------------------------------------------------------------

of_plain("vocabulary_1", "V = 1: certain, all gradients 0", vocab=1)
of_plain("vocabulary_2", "V = 2, less than a vector", vocab=2)
of_plain("vocabulary_tiles", "more than one tile and no multiple of one", rows=3, vocab=9001)


@case("padded vocabulary: columns from vocab_size on count as -inf, whatever they hold")
def padded_vocabulary(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, vocab=128)
    sample.logits[:, 101:] = torch.tensor([NAN, INF, -INF], dtype=dtype, device=device).repeat(9)
    sample.target.clamp_(max=100)
    sample.target[0] = 100
    sample.kwargs["vocab_size"] = 101
    return sample


@case("padded vocabulary under softcap: -inf after the cap, not before")
def padded_softcap(dtype: torch.dtype, device: str) -> Sample:
    sample = padded_vocabulary(dtype, device)
    sample.kwargs["softcap"] = 4.0
    return sample


@case("a vocab_size of 1")
def padded_to_one(dtype: torch.dtype, device: str) -> Sample:
    sample = plain(dtype, device, vocab_size=1)
    sample.target.zero_()
    return sample
