"""Flower's message types of split learning, as ``category.action``."""

STEP = "train.step"
FINISH = "train.finish"
LOCAL = "train.local"
EVALUATE = "evaluate.step"
DESCRIBE = "query.describe"
SHAPE = "query.shape"
