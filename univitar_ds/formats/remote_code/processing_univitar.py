"""Prepares images, videos and texts in one call."""

from transformers import BatchFeature, ProcessorMixin

MAX_CHARACTERS = 256
"""Maximum characters of a text per token of the context length: the rest of a longer text is not read."""


class UniViTARProcessor(ProcessorMixin):
    """Image processor and tokenizer. Texts are encoded as in training and cut to the context length."""

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text=None, videos=None, return_tensors="pt", **kwargs):
        """Prepares the model's input.

        Args: images: an image or a list, whose items may also be videos; text: a text or a list; videos: a list of
            videos, each a list of frames (PIL images); kwargs: options of the tokenizer.
        Returns: BatchFeature with input_ids (M, S) and attention_mask for texts, pixel_values (T, 1176) and grid_thw
            (N, 3) for images and then videos.
        Raises: ValueError if nothing is given, and the errors of the image processor.
        """
        items = [*(images if isinstance(images, (list, tuple)) else [] if images is None else [images])]
        items += [] if videos is None else list(videos)
        if text is None and not items:
            raise ValueError("the processor takes at least one text, image or video")
        data = {}
        if text is not None:
            limit = MAX_CHARACTERS * self.tokenizer.model_max_length
            texts = [self._encodable(one[:limit]) for one in ([text] if isinstance(text, str) else text)]
            options = {"padding": True, "truncation": True, **kwargs}
            data.update(self.tokenizer(texts, return_tensors=return_tensors, **options))
        if items:
            data.update(self.image_processor(items, return_tensors=return_tensors))
        return BatchFeature(data)

    def _encodable(self, text):
        """Replaces halves of surrogate pairs, which UTF-8 cannot encode."""
        return text.encode("utf-8", "replace").decode()
