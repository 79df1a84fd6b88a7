# Sourced: what this machine offers to guests.

# Bare-metal guests run on any /dev/kvm.
usable_kvm() { [ -r /dev/kvm ] && [ -w /dev/kvm ]; }

# Linux guests also need VT-x or AMD-V; without them, the lab.
needs_lab() { ! { usable_kvm && grep -qwE 'vmx|svm' /proc/cpuinfo; }; }
