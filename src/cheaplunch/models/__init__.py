"""The network: an image encoder with SAM's prompt encoder and mask decoder, and what is trained on them."""
