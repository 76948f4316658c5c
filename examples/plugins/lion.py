"""Lion (arXiv:2302.06675): the sign of a mean of gradients. It needs about a tenth of AdamW's learning rate.

univitar-ds train --config photos 'plugins=[examples/plugins/lion.py]' optimizer.kind=lion optimizer.options.beta2=0.98
"""

from univitar_ds.plugins import Moment, register_optimizer

__version__ = "1"


@register_optimizer("lion")
class Lion:
    def __init__(self, beta1=0.9, beta2=0.99):
        self.beta1, self.beta2 = beta1, beta2
        self.moments = {"mean": Moment(dtype="float32", initial=0.0)}

    def step(self, weights, gradient, moments, *, lr, weight_decay, step):
        mean = moments["mean"]
        direction = mean.lerp(gradient, 1 - self.beta1).sign_()
        weights.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
        mean.lerp_(gradient, 1 - self.beta2)
