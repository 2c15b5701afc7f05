// Package qemu drives QEMU as a vmm.Driver: one process per sandbox, jailed,
// on the q35 machine with KVM or, where that does not work, by emulation.
//
// It owns QEMU's command line, its three sockets (machine protocol, console,
// link), the journal in which QEMU keeps what it says on the first, the choice
// of the accelerator, the reading of why a machine ended, and the format of a
// saved machine's state. Guests' memory is in package ram.
// It never opens a path that a guest or a caller made up inside QEMU: kernel,
// initramfs, disks, tap and sockets are opened here and passed as descriptors,
// so that QEMU needs no right to any directory.
//
// # Facts that the code relies on
//
//   - A reset ends QEMU (-no-reboot), so that a guest's reboot and the end of a
//     panicked kernel (panic=-1) are exits with a reason. QEMU tells a reset and
//     a power-off apart by its SHUTDOWN event; the panic is in the console.
//   - QEMU starts stopped (-S). The machine protocol and the console are
//     connected before the guest's first instruction, so nothing is missed.
//   - Every socket is a listening one of ours that QEMU accepts from, one client
//     at a time; after hutchd's end QEMU accepts the next hutchd's. What the
//     guest writes while nobody is connected is dropped, never waited for.
//   - QEMU writes its events into the journal (logfile= of the protocol's
//     chardev) also when nobody is connected. So a machine that ended while
//     hutchd was away has said whether its guest powered off; one that has not
//     said anything crashed. A panic and a reboot are the same there.
//   - A disk that cannot be written (a full host) is an I/O error in the guest,
//     never a silently stopped machine.
//   - A writable disk is locked by QEMU on the description that was opened
//     here: two machines cannot write one disk. A restored machine takes its
//     locks at the end of the load, and says only in its log that it could not:
//     then Resume fails.
//   - xen-save-devices-state writes all devices and no memory, whether that is
//     shared or a copy on write, has nothing to do with Xen, and with live=false
//     leaves the disks alone. It writes no section about the configuration and
//     no description after it, so that a QEMU that loads it is told to expect
//     none (send-configuration, suppress-vmdesc). It opens its file to write
//     and truncates it: no pipe will do.
//   - It leaves out the firmware's ROM with the memory. A restored machine reads
//     zeros there (below 4 GB; the firmware's copy below 1 MB is memory). Nothing
//     goes back to it: a reset ends QEMU. So it needs no kernel either.
//   - QEMU itself compares hardly anything of a state with the machine that
//     loads it. What must fit is in the header that is written here.
//   - A link that opens or closes is told to the guest by a write to its memory,
//     also while it stands. So a save closes the link and waits until QEMU has
//     seen it, and nobody opens it meanwhile.
//   - A QEMU that cannot load a state says why on its standard error and exits.
//
// Tested by vmmtest with real machines, the command line by a golden file, and
// the rest without QEMU.
package qemu
