"""A hinge loss between images and texts: cosine above `HIGH` for pairs, below `LOW` for all others.

univitar-ds train --config photos 'plugins=[examples/plugins/hinge_loss.py]' objective.kind=hinge
"""

from univitar_ds.plugins import register_objective

HIGH, LOW = 0.8, 0.1


@register_objective("hinge")
class Hinge:
    def loss_of_chunk(self, images, texts, scale, bias, positives):
        cosine = images @ texts.T  # (n, m)
        near = (HIGH - cosine).clamp(min=0) * positives
        far = (cosine - LOW).clamp(min=0) * ~positives
        return (near + far).sum()
