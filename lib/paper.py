"""Published numbers, by the names that the scripts use. Toxicity is Detoxify's; perplexity is its logarithm."""

import math

from lib.errors import UserError

# Yang tables 2 and 19: condition -> model -> (toxicity, log-perplexity, F1). Perplexity was measured with the edit at
# position 0 alone. Table 19 repeats Mistral's DPO row as 0.221 / 2.01 / 0.233.
PATCHING = {
    "none": {
        "gpt2": (0.545, 3.08, 0.193),
        "llama": (0.496, 1.94, 0.225),
        "gemma": (0.488, 4.61, 0.231),
        "mistral": (0.507, 1.76, 0.221),
    },
    "dpo": {
        "gpt2": (0.21, 3.15, 0.195),
        "llama": (0.241, 2.69, 0.221),
        "gemma": (0.245, 5.15, 0.228),
        "mistral": (0.191, 2.01, 0.223),
    },
    "toxic_neurons": {
        "gpt2": (0.479, 3.09, 0.193),
        "llama": (0.491, 1.94, 0.225),
        "gemma": (0.487, 4.61, 0.231),
        "mistral": (0.505, 1.76, 0.232),
    },
    "top256": {
        "gpt2": (0.465, 3.07, 0.193),
        "llama": (0.488, 1.94, 0.225),
        "gemma": (0.482, 4.61, 0.231),
        "mistral": (0.455, 1.76, 0.232),
    },
    "TP": {
        "gpt2": (0.407, 3.07, 0.191),
        "llama": (0.488, 1.94, 0.223),
        "gemma": (0.47, 4.87, 0.235),
        "mistral": (0.502, 1.8, 0.229),
    },
    "TP+AN": {
        "gpt2": (0.216, 3.08, 0.183),
        "llama": (0.465, 1.94, 0.221),
        "gemma": (0.337, 4.59, 0.224),
        "mistral": (0.307, 1.76, 0.227),
    },
    "TP+AN+TN": {
        "gpt2": (0.194, 3.08, 0.17),
        "llama": (0.391, 1.94, 0.208),
        "gemma": (0.307, 4.59, 0.217),
        "mistral": (0.238, 1.81, 0.218),
    },
    "four_groups": {
        "gpt2": (0.139, 3.08, 0.17),
        "llama": (0.278, 1.94, 0.207),
        "gemma": (0.26, 4.58, 0.213),
        "mistral": (0.138, 1.78, 0.209),
    },
    "increasing": {
        "gpt2": (0.853, 6.05, 0.154),
        "llama": (0.536, 2.64, 0.184),
        "gemma": (0.686, 4.58, 0.199),
        "mistral": (0.611, 1.78, 0.199),
    },
}

# Yang tables 2 and 19: activation editing (alpha, beta), and table 12: steering by alpha times the probe.
EDITING = {
    "probe a=0.01 b=0.8": {
        "gpt2": (0.123, 3.08, 0.179),
        "llama": (0.045, 2.19, 0.186),
        "gemma": (0.199, 4.54, 0.188),
        "mistral": (0.038, 1.77, 0.179),
    },
    "probe a=0.01 b=0.6": {
        "gpt2": (0.159, 3.08, 0.181),
        "llama": (0.183, 2.11, 0.193),
        "gemma": (0.2, 4.56, 0.201),
        "mistral": (0.098, 1.77, 0.196),
    },
    "probe a=0.01 b=0.55": {
        "gpt2": (0.203, 3.08, 0.183),
        "llama": (0.241, 1.96, 0.196),
        "gemma": (0.216, 4.56, 0.21),
        "mistral": (0.125, 1.77, 0.202),
    },
    "probe a=0.05 b=0.5": {
        "gpt2": (0.211, 3.08, 0.184),
        "llama": (0.299, 1.96, 0.2),
        "gemma": (0.26, 4.56, 0.204),
        "mistral": (0.264, 1.77, 0.197),
    },
    "tokens a=0.01 b=0.8": {
        "gpt2": (0.139, 3.08, 0.176),
        "llama": (0.116, 5.82, 0.2),
        "gemma": (0.218, 4.54, 0.18),
        "mistral": (0.057, 1.77, 0.191),
    },
    "tokens a=0.01 b=0.6": {
        "gpt2": (0.238, 3.08, 0.178),
        "llama": (0.258, 2.28, 0.21),
        "gemma": (0.216, 4.57, 0.203),
        "mistral": (0.162, 1.77, 0.2),
    },
    "tokens a=0.01 b=0.55": {
        "gpt2": (0.282, 3.08, 0.18),
        "llama": (0.318, 2.24, 0.204),
        "gemma": (0.25, 4.58, 0.198),
        "mistral": (0.239, 1.77, 0.201),
    },
    "activation a=0.01 b=0.8": {
        "gpt2": (0.025, 3.08, 0.158),
        "llama": (0.097, 2.39, 0.188),
        "gemma": (0.271, 4.56, 0.183),
        "mistral": (0.154, 1.77, 0.196),
    },
    "activation a=0.01 b=0.6": {
        "gpt2": (0.075, 3.07, 0.178),
        "llama": (0.204, 2.26, 0.198),
        "gemma": (0.295, 4.57, 0.202),
        "mistral": (0.218, 1.77, 0.201),
    },
    "activation a=0.01 b=0.55": {
        "gpt2": (0.111, 3.08, 0.175),
        "llama": (0.258, 2.25, 0.203),
        "gemma": (0.33, 4.57, 0.199),
        "mistral": (0.229, 1.77, 0.202),
    },
    "activation a=0.05 b=0.5": {
        "gpt2": (0.109, 3.08, 0.178),
        "llama": (0.31, 1.96, 0.204),
        "gemma": (0.331, 4.58, 0.204),
        "mistral": (0.251, 1.77, 0.193),
    },
}
STEERING = {  # model -> alpha -> (toxicity, log-perplexity, F1); table 11 chose the first
    "gpt2": {30: (0.31, 3.19, 0.191), 40: (0.25, 3.34, 0.18)},
    "llama": {2: (0.335, 2.72, 0.187), 3: (0.267, 3.53, 0.18)},
    "gemma": {3: (0.26, 5.52, 0.228), 5: (0.251, 5.64, 0.226)},
    "mistral": {5: (0.35, 2.23, 0.22), 7: (0.319, 2.63, 0.212)},
}
PUBLISHED = PATCHING | EDITING

# Yang table 3: neurons with a toxic token, % of DPO's reduction when they are patched; the same of the top 256.
TOXIC_TOKEN_NEURONS = {"gpt2": (59, 19.7), "llama": (7, 1.96), "gemma": (3, 0.41), "mistral": (14, 0.63)}
TOP_256 = {"gpt2": 23.9, "llama": 3.14, "gemma": 2.47, "mistral": 16.5}

# Yang table 17: r(activation shift, cosine with the probe), r(activation shift, activation before DPO).
SHIFT_CORRELATIONS = {
    "gpt2": (0.004, 0.263),
    "llama": (0.001, 0.033),
    "gemma": (0.004, 0.098),
    "mistral": (0.003, 0.347),
}

# Yang appendix G, GPT-2: % of value vectors with conflicting signs along three SVD directions, % of neurons whose
# projection changes inconsistently.
SUBSPACE = {"gpt2": (74.7, 74.3)}

# Lee tables 2 and 4 (GPT2-medium): toxicity by Perspective, perplexity as its exponential, F1.
LEE = {
    "none": (0.453, 21.7, 0.193),
    "dpo": (0.208, 23.34, 0.195),
    "steer probe": (0.245, 23.56, 0.193),
    "steer value:L19.N770": (0.305, 23.3, 0.192),
    "steer svd:0": (0.268, 23.48, 0.193),
    "unalign": (0.458, 23.3, 0.195),
}

# Scales in Lee's released code (table 2): of the probe, a value vector, and the first SVD direction at length 1.
LEE_SCALES = {"probe": 50, "value:L19.N770": 20, "svd:0": 100}

# Lee table 1: the value vectors of GPT2-medium, best aligned with its probe first.
LEE_TOXIC_VECTORS = ((19, 770), (12, 771), (18, 2669), (13, 668), (16, 255), (12, 882), (19, 1438))

# Yang table 7: the words whose mean embeddings differ by the contrastive vector.
TOXIC_WORDS = ("fuck", "shit", "crap", "damn", "asshole")
PLAIN_WORDS = ("hello", "thanks", "friend", "peace", "welcome")

# Neurons that Yang's tables 6, 14 and 15 misname: the released notebook divided a flat index by 4 * 4096 where d_mlp is
# 14,336. Right: `neuron(flat index, 14336)`.
MISNAMED = {
    "llama": {(25, 14065): (29, 7921), (18, 15439): (21, 9295), (25, 14671): (29, 8527)},
    "mistral": {(14, 14693): (17, 357)},
}


def neuron(flat: int, d_mlp: int) -> tuple[int, int]:
    """(layer, index) of a flat index over all layers' neurons."""
    return divmod(flat, d_mlp)


# Yang table 5: model -> shares (%) of TP, TN, AP, AN among the neurons that reduce, and their number.
GROUP_SHARES = {
    "gpt2": (6.9, 39.1, 3.2, 50.9, 57501),
    "llama": (25.4, 24.4, 24.6, 25.5, 239460),
    "gemma": (28.8, 21.3, 21.3, 28.6, 123898),
    "mistral": (29.7, 20.3, 20.2, 29.8, 238236),
}

# Yang table 13: % of neurons with a negative mean activation before DPO; table 18: % whose toxic projection fell.
PERCENT_NEGATIVE = {"gpt2": 87.28, "llama": 49.96, "gemma": 49.94, "mistral": 50.03}
PERCENT_REDUCING = {"gpt2": 58.49, "llama": 53.01, "gemma": 51.75, "mistral": 51.98}

# Yang table 11: test accuracy of the probe.
PROBE_ACCURACY = {"gpt2": 0.956, "llama": 0.926, "gemma": 0.961, "mistral": 0.91}

# The paper's model that a model from PyPI resembles most, for a column of published numbers beside ours.
COUNTERPART = {"gemma-270m": "gemma", "smollm2": "llama"}


def lee(condition: str) -> dict:
    """`{"published": ...}` of a condition of Lee's tables, as rows of a record hold it, or nothing."""
    if condition not in LEE:
        return {}
    toxicity, perplexity, f1 = LEE[condition]
    row = {"model": "gpt2", "toxicity": toxicity, "log_ppl": round(math.log(perplexity), 3), "f1": f1}
    return {"published": row}


def counterpart(model: str) -> str | None:
    """The model whose published numbers stand beside ours: itself, or its nearest relative; None for any other."""
    return model if model in PROBE_ACCURACY else COUNTERPART.get(model)


def published_row(condition: str, kind: str, model: str) -> dict:
    """`{"published": ...}` for a condition of Yang tables 2 and 19, or nothing; the papers' edits are clamps."""
    theirs = counterpart(model)
    if kind not in {"none", "clamp"} or theirs not in PUBLISHED.get(condition, {}):
        return {}
    toxicity, log_ppl, f1 = PUBLISHED[condition][theirs]
    return {"published": {"model": theirs, "toxicity": toxicity, "log_ppl": log_ppl, "f1": f1}}


def steering_scales(model: str, vector: str) -> list[float]:
    """The papers' scales of a steering vector. Raises UserError where they give none."""
    scales = set(STEERING.get(model, {})) if vector == "probe" else set()
    if model == "gpt2" and vector in LEE_SCALES:
        scales.add(LEE_SCALES[vector])
    if not scales:
        raise UserError(
            f"--alpha published: the papers give none for {vector} of {model}; give numbers, or leave it out."
        )
    return sorted(map(float, scales))


def lee_steering(condition: str, kind: str) -> dict:
    """`{"published": ...}` for a condition of steer.py from Lee table 2, or nothing."""
    for vector, scale in LEE_SCALES.items():
        label = "steer" if vector == "probe" else f"steer {vector}"
        if condition in (f"{label} alpha*", f"{label} a={scale}"):
            return lee(f"steer {vector}")
    return lee(condition)


def yang_steering(model: str, condition: str, kind: str) -> dict:
    """`{"published": ...}` for a condition of steer.py from Yang tables 2 and 12, or nothing."""
    theirs = counterpart(model)
    rows = {f"steer a={alpha:g}": numbers for alpha, numbers in STEERING.get(theirs, {}).items()}
    if rows:
        rows["steer alpha*"] = next(iter(rows.values()))  # the alpha that table 11 chose to keep perplexity
    if condition not in rows:
        return published_row(condition, kind, model)
    toxicity, log_ppl, f1 = rows[condition]
    return {"published": {"model": theirs, "toxicity": toxicity, "log_ppl": log_ppl, "f1": f1}}
