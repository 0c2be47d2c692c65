"""GBNN's fit beside scikit-learn's: the same network of 100 hidden units trained jointly, and the same boosting with scikit-learn's MLPRegressor as the small network (as the official code does).

All three run L-BFGS with at most 200 iterations and the same default tolerance; the loop over MLPRegressor has the same block size, shrinkage, rows and step lengths.
"""
import warnings

import numpy as np
import pandas as pd
from harness import ratios, report, side_by_side
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from efftrain.optim.gbnn import GBNNClassifier, GBNNRegressor
from efftrain.optim.gbnn_blocks import Logistic, Softmax, SquaredError, step_length

UNITS, BLOCK, RATE = 100, 5, 0.3
SETS = {"breast_cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits, "diabetes": load_diabetes}


def loop(x, y, loss):
    """Boosting with one MLPRegressor a step; the training loss."""
    rng = np.random.RandomState(0)
    f = np.tile(loss.start(y), (len(y), 1))
    for _ in range(UNITS // BLOCK):
        r = loss.residuals(y, f)
        rows = rng.choice(len(y), len(y) // 2, replace=False)
        net = MLPRegressor(hidden_layer_sizes=(BLOCK,), activation="logistic", solver="lbfgs", max_iter=200, tol=0.0, random_state=rng).fit(x[rows], r[rows].squeeze())
        h = net.predict(x).reshape(len(y), -1)
        f += RATE * step_length(loss, y, f, h, "newton") * h
    return loss.value(y, f)


def test_fit(tables):
    frames = []
    for name, load in SETS.items():
        x, y = (part[:600] for part in load(return_X_y=True))
        x = StandardScaler().fit_transform(x)
        number = name == "diabetes"
        if number: y = (y - y.mean()) / y.std()
        classes = 0 if number else y.max() + 1
        target = y.reshape(-1, 1).astype(float) if classes in (0, 2) else np.eye(classes)[y]
        loss = {0: SquaredError, 2: Logistic}.get(classes, Softmax)
        ours = (GBNNRegressor if number else GBNNClassifier)(UNITS // BLOCK, BLOCK, learning_rate=RATE, random_state=0)
        joint = (MLPRegressor if number else MLPClassifier)(hidden_layer_sizes=(UNITS,), activation="logistic", solver="lbfgs", max_iter=200, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame = ratios(side_by_side({"GBNN": lambda: ours.fit(x, y), "boosting of MLPRegressor": lambda: loop(x, target, loss()), "joint MLP": lambda: joint.fit(x, y)}, rounds=3, warmup=1), "GBNN", {}, copy="GBNN")
            # As good a fit, within a factor: our blocks see residuals scaled to 1, so the same alpha holds late blocks less, and they follow their half of the rows more closely.
            assert ours.train_losses_[-1] < 4 * loop(x, target, loss()) + 1e-4, name
        frames.append(frame.drop(columns=["words", "floor_ms", "of_floor"]).assign(data=name))
    frame = pd.concat(frames, ignore_index=True)
    least = frame[frame.name == "boosting of MLPRegressor"].ours_faster.min()
    joint = frame[frame.name == "joint MLP"].ours_faster.min()
    tables.append(report("gbnn", f"Fit of {UNITS} hidden units, steps of {BLOCK}", frame, {"times faster than boosting of MLPRegressor, at least": (least, 1, least >= 1), "of the joint network's speed, at least": (joint, 0.2, joint >= 0.2)}, ("scikit-learn",)))
