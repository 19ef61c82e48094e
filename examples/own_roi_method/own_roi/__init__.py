"""RoI methods of this project; configs/roi/ has a file for each."""

from own_roi.shifted import ShiftedRoIAlign
