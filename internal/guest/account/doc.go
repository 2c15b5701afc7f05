// Package account knows on whose behalf the guest agent acts: the users and
// groups of the guest, the defaults of the sandbox, and how one thread takes
// on a user's file rights.
//
// It owns the reading of /etc/passwd and /etc/group (bounded, because the
// guest can write anything there), the choice of the user for a call, and the
// switch of the file identity. It never runs programs and never changes the
// identity of the whole process. The packages process and files stand on it.
// Tested against made-up trees of account files, and, as root, against the
// kernel's own permission checks.
package account
