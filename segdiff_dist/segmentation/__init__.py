"""The auxiliary segmenter: a 2-D U-Net, trained on real slices, that measures whether images follow their masks.

Section 4.2 of the paper: channels 16 to 512, kernel 3, stride 2.
"""
