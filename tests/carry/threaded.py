"""A stand-in for Flower's grid whose nodes are threads of this process."""

import threading
import uuid

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from flsplit.carry.session.host import serve_session
from flsplit.flower_internals import Run, ensure_task_identity, set_message_id

COMPUTE = threading.Lock()
"""torch.fx patches nn.Module while it traces, so no other thread may run a model meanwhile."""


class OneAtATime:
    """A ClientApp of which one call runs at a time, in whatever thread."""

    def __init__(self, app):
        self.app = app

    def __call__(self, message, context):
        with COMPUTE:
            return self.app(message, context)


class ThreadedGrid(Grid):
    """Runs ``serve_session`` (or another function) in a thread per node and message.

    Parameters
    ----------
    app : ClientApp
        What the nodes run.
    num_nodes : int
        How many there are, with ids 101, 102, …
    serve : dict of int to callable, optional
        What some nodes do instead of ``serve_session``, by their partition.
    """

    def __init__(self, app, num_nodes, serve=None, node_config=None):
        ensure_task_identity(run_id=1)
        self.app = OneAtATime(app)
        self.serve = serve or {}
        self.pushed = []
        self.replies = {}
        self.threads = []
        self.contexts = {
            101 + index: Context(
                run_id=1,
                node_id=101 + index,
                node_config={"partition-id": index, "num-partitions": num_nodes}
                | (node_config or {}),
                state=RecordDict(),
                run_config={},
            )
            for index in range(num_nodes)
        }

    @property
    def run(self):
        return Run.create_empty(run_id=1)

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            set_message_id(message, message_id)
            self.pushed.append(message)
            ids.append(message_id)
            thread = threading.Thread(target=self._work, args=(message_id, message), daemon=True)
            thread.start()
            self.threads.append(thread)
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(one) for one in message_ids if one in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        ids = self.push_messages(messages)
        for thread in self.threads:
            thread.join(timeout)
        return self.pull_messages(ids)

    def _work(self, message_id, message):
        context = self.contexts[message.metadata.dst_node_id]
        partition = context.node_config["partition-id"]
        try:
            if message.metadata.message_type == "train.session":
                serve = self.serve.get(partition, serve_session)
                self.replies[message_id] = serve(self.app, message, context)
            else:
                self.replies[message_id] = self.app(message, context)
        except Exception as error:
            self.replies[message_id] = Message(Error(2, repr(error)), reply_to=message)

    def join(self):
        """Wait until all nodes have ended."""
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
