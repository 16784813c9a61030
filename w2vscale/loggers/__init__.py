"""Where a run is logged: files in its folder, TensorBoard, Weights & Biases, MLflow. One file each."""
