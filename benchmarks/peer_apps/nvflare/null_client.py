"""A site's training script: adds the constant."""

import nvflare.client as flare
from nullmodel import CONSTANT


def main() -> None:
    """Send back each model plus the constant, until the job ends."""
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        for values in model.params.values():
            values += CONSTANT
        flare.send(flare.FLModel(params=model.params, params_type=model.params_type))


if __name__ == "__main__":
    main()
