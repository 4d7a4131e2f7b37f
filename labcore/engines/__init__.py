"""One trained network on the engines that people deploy: what each answers, how fast, in how much memory."""

import logging

# torchao registers its enums in a way that torch calls outdated: a note for torchao's authors.
logging.getLogger("torch.utils._pytree").addFilter(lambda note: "Enum subclass" not in note.getMessage())
