"""What the paper prints, as data.

Rahaman, Millar and Meijering 2023, https://doi.org/10.1038/s41598-023-40219-0, CC BY 4.0. Its
Tables 1, 2 and 3 whole; of Figs 2 and 3 what the text says in numbers, for the bars of the other
models are a picture. Supplementary Table S1 (Table 1 without AuxNet) is not at hand.
"""

import io

import pandas as pd

NAMES = {
    "resnet101": "ResNet101",
    "inception_v3": "Inception-v3",
    **{f"efficientnet_b{size}": f"EfficientNet-b{size}" for size in range(6)},
    "vit_b16": "ViT-B16",
    "vit_b32": "ViT-B32",
}
"""The ten backbones in the paper's order, and what it calls them."""

BEST = "efficientnet_b0"
"""The paper's best model, with AuxNet."""

PATIENT, MAP_SECTION, MAP_GENE, MAP_PCC = "BC23903", "C2", "B2M", 0.6325
"""Who was held out, and what Fig. 4 shows of the patient."""

PATIENTS, SECTIONS, SPOTS_RAW, SPOTS_KEPT = 23, 68, 30_612, 28_792
"""The data set, before and after the spots below 1000 counts were left out."""

PANEL = 250

GPUS, CPU_CORES = 2, 24
"""What the models were trained on; which GPUs is not said."""

ABOVE_0, ABOVE_HALF, MEDIUM, WEAK = 237, 24, 123, 78
"""Genes of the best model with a PCC above 0, above 0.5, in 0.3 to 0.5, and in 0.1 to 0.3."""

TABLE_1 = """\
symbol resnet101 inception_v3 efficientnet_b0 efficientnet_b1 efficientnet_b2 \
efficientnet_b3 efficientnet_b4 efficientnet_b5 vit_b16 vit_b32
B2M 0.4729 0.5720 0.6325 0.5659 0.5722 0.5199 0.6221 0.1800 0.5475 0.3909
ACTG1 0.5457 0.5391 0.6233 0.5637 0.6054 0.5888 0.6220 0.2259 0.6075 0.5231
ACTB 0.6066 0.4985 0.6204 0.3723 0.4843 0.5919 0.6147 0.2718 0.6359 0.5452
TMSB10 0.3896 0.4678 0.6197 0.0634 0.4597 0.5621 0.5717 0.2038 0.5576 0.1359
GNAS 0.5019 0.5896 0.6139 0.5864 0.5886 0.5976 0.6170 0.2588 0.5872 0.4148
PTMA 0.5521 0.5072 0.5902 0.5641 0.5654 0.5423 0.5956 0.3685 0.5639 0.4762
PTPRF 0.4927 0.5269 0.5926 0.5667 0.5524 0.5359 0.5568 0.0733 0.5126 0.4643
ERBB2 0.3156 0.5033 0.5897 0.3600 0.3499 0.5930 0.5750 0.1684 0.5343 0.4626
PRDX1 0.4561 0.5329 0.5702 0.4478 0.5246 0.5405 0.5466 0.1213 0.5262 0.4789
TMSB4X 0.4238 0.4884 0.5665 0.3876 0.4203 0.5876 0.5872 0.2086 0.5717 0.5345
"""

TABLES_2_AND_3 = """\
backbone auxnet training_aMAE training_aRMSE test_aMAE test_aRMSE time
resnet101 True 0.7823 0.9654 0.7609 0.9344 23:17:50
inception_v3 True 0.7831 0.9650 0.7403 0.9036 20:04:46
efficientnet_b0 True 0.7730 0.9528 0.7490 0.9144 19:04:28
efficientnet_b1 True 0.7489 0.9259 0.7345 0.8976 23:54:54
efficientnet_b2 True 0.7618 0.9399 0.7277 0.8898 23:30:49
efficientnet_b3 True 0.7858 0.9677 0.7481 0.9135 25:02:51
efficientnet_b4 True 0.8037 0.9899 0.7718 0.9409 29:58:24
efficientnet_b5 True 0.8042 0.9904 0.7905 0.9716 37:02:11
vit_b16 True 0.7909 0.9754 0.7262 0.8893 33:09:25
vit_b32 True 0.8039 0.9909 0.7699 0.9403 17:08:06
resnet101 False 0.7830 0.9675 0.7484 0.9158 23:58:59
inception_v3 False 0.7801 0.9657 0.7470 0.9148 20:05:58
efficientnet_b0 False 0.7456 0.9242 0.7499 0.9148 19:49:15
efficientnet_b1 False 0.7529 0.9324 0.7462 0.9122 23:07:10
efficientnet_b2 False 0.7610 0.9419 0.7397 0.9042 22:35:53
efficientnet_b3 False 0.8008 0.9878 0.7465 0.9120 25:00:06
efficientnet_b4 False 0.7635 0.9446 0.7445 0.9100 30:02:30
efficientnet_b5 False 0.7761 0.9586 0.7374 0.9017 37:36:46
vit_b16 False 0.7878 0.9730 0.7621 0.9324 32:18:28
vit_b32 False 0.7961 0.9829 0.7607 0.9311 17:18:28
"""

ERRORS = ("training_aMAE", "training_aRMSE", "test_aMAE", "test_aRMSE")


def table_1() -> pd.DataFrame:
    """Median PCC on the held-out patient with AuxNet: a row a gene symbol, a column a backbone."""
    return _read(TABLE_1).set_index("symbol")


def table_2() -> pd.DataFrame:
    """ERRORS of each model, in standardised units: index backbone, auxnet."""
    return _read(TABLES_2_AND_3).set_index(["backbone", "auxnet"])[list(ERRORS)]


def table_3() -> pd.Series:
    """Training time of each model in seconds: index backbone, auxnet."""
    time = _read(TABLES_2_AND_3).set_index(["backbone", "auxnet"])["time"]
    return pd.to_timedelta(time).dt.total_seconds().rename("seconds")


def bins() -> dict[str, int]:
    """Genes of the best model in each bin of Fig. 2; the last two follow from the others."""
    weaker = ABOVE_0 - WEAK - MEDIUM - ABOVE_HALF
    counts = (PANEL - ABOVE_0, weaker, WEAK, MEDIUM, ABOVE_HALF)
    return dict(zip(("<= 0", "0 - 0.1", "0.1 - 0.3", "0.3 - 0.5", "> 0.5"), counts, strict=True))


def _read(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text), sep=" ")
