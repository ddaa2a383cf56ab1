"""Where frozen weights live: on the device, or on the host, from where blocks take turns in a few device buffers."""
