"""What the README says that rests on verdicts, chosen and written by hand: headlines, findings, advice.

A claim is named by the beginning of its statement. docs/readme.py looks each up in results/, quotes what was
measured, and refuses a sentence whose verdict has turned.
"""

from typing import NamedTuple

from common.statistics import FAILS, HOLDS, UNCLEAR


class Lesson(NamedTuple):
    """A row of the table of lessons: minutes of study, difficulty, and the beginning of its headline claim."""

    name: str
    question: str
    minutes: str
    difficulty: str
    headline: str


LESSONS = {
    "14": Lesson(
        "Dropout",
        "When does switching units off at random help, and how many?",
        "60–75",
        "intermediate",
        "Adding dropout improves generalisation",
    ),
    "15": Lesson(
        "Regularisation techniques",
        "What helps against overfitting, and what does more than a lower learning rate?",
        "60–75",
        "advanced",
        "Decay and dropout beat a lower rate by 1 point",
    ),
    "16": Lesson(
        "Batch normalisation",
        "Does it make deep networks trainable, and is it necessary?",
        "60–75",
        "intermediate",
        "20 layers train with batch norm",
    ),
    "17": Lesson(
        "Its relatives",
        "Which norm for which batch, image or sequence?",
        "60–75",
        "advanced",
        "In batches of 2 group norm leads batch norm",
    ),
    "18": Lesson(
        "Learning-rate scheduling",
        "What does a schedule gain, for long and for short runs?",
        "60–75",
        "advanced",
        "Schedules gain 5 points on a tuned constant rate",
    ),
    "19": Lesson(
        "Weight initialisation",
        "Which weights to start from, and when does the choice stop mattering?",
        "60–75",
        "advanced",
        "Ten ReLU layers train from PyTorch's weights",
    ),
}


class Finding(NamedTuple):
    """A sentence, and the verdicts on digits that it rests on, by the beginning of each claim's statement; and those on
    clothes, where it speaks of them.
    """

    sentence: str
    rests_on: dict[str, str]
    on_clothes: dict[str, str] | None = None


FINDINGS = {
    "14": [
        Finding(
            "On a few hundred digits dropout pays where labels are wrong; on 10,000 clothes, at the same high learning "
            "rate, it costs accuracy.",
            {
                "Adding dropout improves generalisation": HOLDS,
                "With 800 images dropout gains more": HOLDS,
                "With 800 right labels dropout still helps": FAILS,
            },
            {"Adding dropout improves generalisation": FAILS, "With 800 images dropout gains more": FAILS},
        ),
        Finding(
            "A lower learning rate does more against wrong labels than dropout; what dropout adds to it is small on "
            "both.",
            {"Dropout does more than a lower learning": UNCLEAR},
            {"Dropout does more than a lower learning": UNCLEAR},
        ),
        Finding(
            "On digits the usual range of p is too low for a shallow network and right for a deep one; on clothes it "
            "is right for neither.",
            {"In a shallow network a p from 0.1 to 0.2": FAILS, "In a deep network a p from 0.3 to 0.5": HOLDS},
            {"In a shallow network a p from 0.1 to 0.2": FAILS, "In a deep network a p from 0.3 to 0.5": FAILS},
        ),
    ],
    "15": [
        Finding(
            "Against wrong labels decay and dropout help on digits, not on clothes at this high rate. "
            "A lower learning rate does more on both. Augmentation adds to the best rate on digits; on clothes it "
            "costs accuracy.",
            {
                "Decay and dropout gain 3 points at a high rate": HOLDS,
                "Decay and dropout beat a lower rate": FAILS,
                "Augmentation adds to a tuned rate (wrong)": HOLDS,
            },
            {
                "Decay and dropout gain 3 points at a high rate": FAILS,
                "Decay and dropout beat a lower rate": FAILS,
                "Augmentation adds to a tuned rate (wrong)": FAILS,
            },
        ),
        Finding(
            "A validation loss that rises need not mean worse predictions, and early stopping is not free with "
            "right labels.",
            {
                "Accuracy falls once validation loss rises (wrong)": HOLDS,
                "Accuracy falls once validation loss rises (right)": FAILS,
                "Early stopping is free at a high rate (right": FAILS,
            },
        ),
        Finding(
            "L1 makes zeros only if you write its proximal step.",
            {
                "L1 makes a tenth of the weights zero (proximal)": HOLDS,
                "L1 makes a tenth of the weights zero (subgradient)": FAILS,
            },
        ),
    ],
    "16": [
        Finding(
            "Batch norm makes a deep plain network train. So does a good start; skip connections learn faster.",
            {
                "20 layers train with batch norm": HOLDS,
                "20 layers fail with He's start": FAILS,
                "Batch norm learns as fast as skips with 20 layers": FAILS,
            },
        ),
        Finding(
            "It allows higher rates and forgives small starting weights, not large ones.",
            {
                "With batch norm twice the learning rate works": HOLDS,
                "With batch norm a tenth of He's start costs nothing": HOLDS,
                "With batch norm ten times He's start costs nothing": FAILS,
            },
        ),
        Finding(
            "A forgotten `eval()` costs accuracy, costs nothing, or flatters: it depends on what is in the batch.",
            {
                "A forgotten eval() costs accuracy (10 random": HOLDS,
                "A forgotten eval() costs over a point (400 random": FAILS,
                "A forgotten eval() costs accuracy (one image a class)": FAILS,
            },
        ),
    ],
    "17": [
        Finding(
            "With batches of 2 batch norm is far behind layer norm on vectors, and loses nothing on feature maps of "
            "digits: the numbers in a mean count here, not the images in a batch.",
            {
                "In batches of 2 vectors layer norm beats batch norm": HOLDS,
                "In batches of 4 vectors layer norm beats batch norm": FAILS,
                "Batches of 2 images cost batch norm 3 points": FAILS,
            },
        ),
        Finding(
            "What instance norm takes out is gone for good: it ignores a change of contrast, and cannot tell one.",
            {"Changed contrast costs instance norm nothing": HOLDS, "Instance norm hides by what factor": HOLDS},
        ),
        Finding(
            "“Layer norm for sequences” is no law: a norm helps a small transformer, and batch norm does as well.",
            {
                "Layer norm gains 2 points over none (transformer)": HOLDS,
                "Layer norm beats batch norm by 2 points (transformer)": FAILS,
            },
        ),
    ],
    "18": [
        Finding(
            "The five to ten points that a schedule is said to gain are not there once the constant rate is tuned as "
            "well; they are where the rate is too high.",
            {
                "Schedules gain 5 points on a tuned constant rate": FAILS,
                "A cosine gains 3 points on a constant rate of 0.1": HOLDS,
            },
        ),
        Finding(
            "One-cycle in half of the epochs is as good as a constant rate in all, but on digits a constant rate in a "
            "fifth nearly is; in few epochs one-cycle gains little.",
            {
                "One-cycle in half the epochs is as good as constant": HOLDS,
                "In few epochs one-cycle gains 2 points": FAILS,
            },
        ),
        Finding(
            "Some slips with a scheduler raise no error and cost points, on digits three or more: stepping per batch "
            "what counts epochs, training with a scheduler that was used up for a plot, a patience of 0.",
            {
                "A cosine of epochs, stepped per batch, costs accuracy": HOLDS,
                "A scheduler used up by a plot costs 10 points": HOLDS,
                "A patience of 0 costs accuracy against 3": HOLDS,
            },
        ),
    ],
    "19": [
        Finding(
            "With SGD ten ReLU layers do not train from PyTorch's weights, and 20 do from He's; two learn as well from "
            "either.",
            {
                "Ten ReLU layers train from PyTorch's weights": FAILS,
                "20 ReLU layers train from He's": HOLDS,
                "Two ReLU layers learn as well from PyTorch's weights": HOLDS,
            },
        ),
        Finding(
            "“Won't train. Period” is wrong: unscaled weights train, at a rate of 1e-10. But they end far behind He's.",
            {
                "Ten layers of unscaled weights do not train": FAILS,
                "Unscaled weights cost 10 points beside He's": HOLDS,
            },
        ),
        Finding(
            "With batch norm or skip connections PyTorch's weights are as good as He's, or better. Adam trains from "
            "them, too, but not from much smaller ones.",
            {
                "With batch norm PyTorch's weights cost under 3 points": HOLDS,
                "With skips He's weights beat PyTorch's": FAILS,
                "Adam trains ten layers from PyTorch's weights": HOLDS,
                "Adam trains ten layers from N(0, 0.01²)": FAILS,
            },
        ),
    ],
}


class Advice(NamedTuple):
    """A row of the cheat sheet: the folk rule, what the runs support, and the verdicts on digits that it rests on, by
    lesson.
    """

    setting: str
    folklore: str
    advice: str
    rests_on: dict[str, dict[str, str]]


CHEAT_SHEET = [
    Advice(
        "dropout p",
        "0.1 to 0.2 in shallow networks, 0.3 to 0.5 in deep ones",
        "with a few hundred images 0.5 in a shallow network that is large enough to learn mistakes by heart, then try "
        "more; 0.3 to 0.5 in a deep one. With thousands tune the learning rate first: at a high one 0.5 hurts. "
        "Not 0.5 in a very small network, nor where labels are right and plentiful",
        {
            "14": {
                "In a shallow network a p from 0.1 to 0.2": FAILS,
                "In a deep network a p from 0.3 to 0.5": HOLDS,
                "Adding dropout improves generalisation": HOLDS,
                "A network of 4 units a layer is hurt": HOLDS,
                "With 800 right labels dropout still helps": FAILS,
            }
        },
    ),
    Advice(
        "weight decay",
        "start at 1e-5 to 1e-4; 0.1 is large",
        "choose it by decades, with AdamW as far as 10, because PyTorch multiplies it by the learning rate; with SGD "
        "1e-4 does nothing here. Tune the learning rate first: with wrong labels a lower one does more",
        {
            "15": {
                "SGD at a high rate: decay 1e-4 gains 1 point": FAILS,
                "Decay and dropout gain 3 points at a high rate": HOLDS,
                "Decay and dropout beat a lower rate": FAILS,
            }
        },
    ),
    Advice(
        "learning rate",
        "1e-3 for Adam, 0.1 for SGD",
        "a grid by half decades for each network, optimiser and budget, before anything else: a better rate may be "
        "worth more than a regulariser. First guesses: 1e-3 for Adam, 0.1 for plain SGD (with 784 noisy pixels 0.01), "
        "with a momentum of 0.9 a tenth of it (lesson 18). With 200 images and wrong labels 1e-3 is too high (lesson "
        "15). With batch norm try higher rates, too",
        {
            "15": {"Decay and dropout beat a lower rate": FAILS},
            "16": {"With batch norm twice the learning rate works": HOLDS},
            "18": {
                "A rate of 0.001 is within 3 points of the best (Adam)": HOLDS,
                "A rate of 0.1 is within 3 points of the best (SGD)": HOLDS,
                "A rate of 0.1 is within 3 points of the best (momentum)": FAILS,
            },
        },
    ),
    Advice(
        "batch size",
        "large batches for batch norm",
        "with batch norm over vectors not 2; over feature maps 2 is enough",
        {
            "17": {
                "In batches of 2 vectors layer norm beats batch norm": HOLDS,
                "Batches of 2 images cost batch norm 3 points": FAILS,
                "In batches of 2 group norm leads batch norm": FAILS,
            }
        },
    ),
    Advice(
        "norm",
        "batch norm for images, layer norm for sequences, group norm for small batches",
        "batch norm in a plain network, before the activation and without a bias; in a deep one skip connections, or "
        "He initialisation; layer norm where a mean would be over two numbers, and in a transformer, where batch norm "
        "does as well here. On feature maps group norm gains nothing, even in batches of 2",
        {
            "16": {
                "20 layers train with batch norm": HOLDS,
                "Batch norm learns as fast as skips with 20 layers": FAILS,
                "With convolutions batch norm gains": HOLDS,
                "Batch norm is as good after the ReLU as before": FAILS,
            },
            "17": {
                "In batches of 2 vectors layer norm beats batch norm": HOLDS,
                "In batches of 2 group norm leads batch norm": FAILS,
                "Layer norm beats batch norm by 2 points (transformer)": FAILS,
            },
        },
    ),
    Advice(
        "start",
        "He for ReLU, Xavier for tanh, LeCun for SELU; PyTorch's default is good",
        "He for ReLU in many layers: PyTorch's default slows six and fails ten. For tanh and SELU any of the three. "
        "With batch norm or skip connections, or two layers, PyTorch's default. Zeros only for biases and, if you "
        "like, the last layer",
        {
            "19": {
                "Six ReLU layers learn faster from He's than PyTorch's": HOLDS,
                "Ten ReLU layers train from PyTorch's weights": FAILS,
                "Six tanh layers: Xavier's gains 5 points over He's": FAILS,
                "Six SELU layers: LeCun's gains 5 points over He's": FAILS,
                "Two ReLU layers learn as well from PyTorch's weights": HOLDS,
                "With batch norm PyTorch's weights cost under 3 points": HOLDS,
                "With skips He's weights beat PyTorch's": FAILS,
                "A zero output layer costs 2 points": FAILS,
            }
        },
    ),
    Advice(
        "schedule",
        "tenfold down every 30 epochs; one-cycle when time is short; gains 5 to 10 points",
        "any, or none: tune the peak, and differences are a point or two. A cosine forgives a rate that is too high; "
        "fewer epochs are enough, with one-cycle or without; ReduceLROnPlateau, with a patience of some epochs, where "
        "the end is not known. Warm-up makes a high rate possible, but not better",
        {
            "18": {
                "Schedules gain 5 points on a tuned constant rate": FAILS,
                "A cosine gains 3 points on a constant rate of 0.1": HOLDS,
                "One-cycle in half the epochs is as good as constant": HOLDS,
                "In few epochs one-cycle gains 2 points": FAILS,
                "Plateau comes within 3 points of a planned cosine": HOLDS,
                "Warm-up gains 20 points at a rate of 0.03": HOLDS,
                "At the best rates warm-up gains a point": FAILS,
            }
        },
    ),
    Advice(
        "all together",
        "dropout + L2 + batch norm + a schedule",
        "add one at a time, and choose all strengths anew: on digits gains overlap, and three gain little over "
        "one. Augmentation is the one to add, where it fits the images: it adds to the best rate",
        {
            "15": {
                "Pairs of techniques gain less than their sum": HOLDS,
                "Three techniques gain 5 points more than decay": FAILS,
                "Augmentation adds to a tuned rate (wrong)": HOLDS,
                "Augmentation adds to a tuned rate (right)": HOLDS,
            }
        },
    ),
]


class Critical(NamedTuple):
    """One of the study guide's critical experiments: its title, the lesson and the experiments that do it, and for each
    thing that the guide expects the beginning of the claim that tests it.
    """

    title: str
    lesson: str
    experiment: str
    expects: dict[str, str]


CRITICAL = [
    Critical(
        "Overfitting demo: a large network, a small data set",
        "14",
        "overfitting",
        {
            "no regularisation → it overfits": "Without dropout accuracy falls once validation loss turns",
            "add dropout → better generalisation": "Adding dropout improves generalisation",
            "add weight decay → even better": "Weight decay on top of dropout gains accuracy",
        },
    ),
    Critical(
        "The impact of batch norm: ten layers and more",
        "16",
        "depth",
        {
            "without → unstable or fails": "10 plain layers do not train",
            "with → trains": "20 layers train with batch norm",
        },
    ),
    Critical(
        "Learning-rate schedule: 100 epochs",
        "18",
        "hundred_epochs",
        {
            "constant rate → plateaus": "Half-way a tuned constant rate stops improving",
            "with a schedule → goes on improving": "After half-way a cosine goes on improving",
        },
    ),
    Critical(
        "Initialisation: a deep network",
        "19",
        "trains symmetry depth",
        {
            "zeros → all neurons identical (a constant, ReLU)": "From one constant 64 ReLU units stay copies",
            "zeros → the network learns nothing (sigmoid)": "From zeros a sigmoid layer learns nothing",
            "no scaling → does not train": "Ten layers of unscaled weights do not train",
            "He → trains": "20 ReLU layers train from He's",
        },
    ),
]
