"""The ClientApp: adds the constant."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from nullmodel import CONSTANT

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send back the model plus the constant, tensor by tensor."""
    arrays = message.content["arrays"]
    update = ArrayRecord({name: Array(array.numpy() + CONSTANT) for name, array in arrays.items()})
    content = RecordDict({"arrays": update, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
