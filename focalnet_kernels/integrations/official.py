"""The authors' own layers: one for classification, one in the detection and segmentation code."""

from .adapter import Adapter


class OfficialClassification(Adapter):
    """Its own forward also stores `gates` and `modulator`; the accelerated one does so on request."""

    form = "authors' classification"
    norm_flag = "use_postln_in_modulation"


class OfficialDetection(Adapter):
    """The form of mmdetection and mmsegmentation backbones, and of their many copies.

    Where such a copy took over the options of classification, as detrex did, it is taken for that form.
    """

    form = "authors' detection and segmentation"
    norm_flag = "use_postln"
