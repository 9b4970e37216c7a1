"""Published numbers, by the names that the scripts use. Toxicity is Detoxify's; perplexity is its logarithm."""

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


def counterpart(model: str) -> str | None:
    """The model whose published numbers stand beside ours: itself, or its nearest relative; None for any other."""
    return model if model in PROBE_ACCURACY else COUNTERPART.get(model)
