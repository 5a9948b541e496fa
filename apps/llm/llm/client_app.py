"""The client: trains the embedding and the first blocks on its own text."""

from functools import lru_cache, partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch.optim import AdamW

from flsplit import client_app
from llm.auxiliary import SequenceHead, next_token
from llm.data import load_partition
from llm.generating import add_generation
from llm.models import RunConfig, build_model, cut_name


class ConfiguredApp(ClientApp):
    """The app of the run config's model and cut, which are not known before a message comes."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Let the configured app answer."""
        return client_app_for(context.run_config)(message, context)


def client_app_for(config: RunConfig, device: str = "auto") -> ClientApp:
    """Return the ClientApp of a run config."""
    return _app(cut_name(config), int(config["auxiliary-blocks"]), device)


@lru_cache
def _app(cut: str, auxiliary_blocks: int, device: str) -> ClientApp:
    app = client_app(
        model=build_model,
        cut=cut,
        data=load_partition,
        optimizer=AdamW,
        device=device,
        auxiliary=partial(SequenceHead, num_blocks=auxiliary_blocks),
        loss=next_token,
    )
    add_generation(app)
    return app


app = ConfiguredApp()
