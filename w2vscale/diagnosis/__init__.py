"""`w2vscale doctor`: checks of the software, the machine, the disk and the network that training needs."""
