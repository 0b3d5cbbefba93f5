"""What any long-running program needs: errors, files, configurations, run folders, devices, processes."""
