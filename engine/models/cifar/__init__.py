"""CIFAR networks of the distillation benchmarks, one family a file.

Parameter and buffer names are those of RepDistiller (CRD) and mdistiller, so that their checkpoints
load strictly. Fixed pooling windows are adaptive here, so that other image sizes work. The suffix
`_s2` of the basic-block ResNets (stem of stride 2, a quarter of the MACs) is ours.
"""

from . import (
    mobilenet_v2,
    resnet,
    resnet_bottleneck,
    shufflenet_v1,
    shufflenet_v2,
    vgg,
    wide_resnet,
)

CIFAR_MODELS = {
    **resnet.VARIANTS,
    **wide_resnet.VARIANTS,
    **vgg.VARIANTS,
    **shufflenet_v1.VARIANTS,
    **shufflenet_v2.VARIANTS,
    **mobilenet_v2.VARIANTS,
    **resnet_bottleneck.VARIANTS,
}
"""Name -> function of the number of classes."""
