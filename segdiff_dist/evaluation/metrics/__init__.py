"""Measures of images, label maps and features: functions of arrays, without files, runs or Ray. Imports stay light."""
