"""flsplit logs where Flower logs, so that ``flwr run --stream`` shows both."""

import logging

logger = logging.getLogger("flwr")
