package main

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// bareArgs turns the command line of a sandbox's QEMU into that of the floor:
// the same machine, processor, memory and devices, but with files and sockets
// by path instead of descriptors, without what confines and names the
// process, and with a network card that is connected to nothing. Its memory is
// the file bareMemoryFD. To be restored it gets a copy on write of that, the
// state of bareStateFD, and nothing to boot.
func bareArgs(p barePlan, dir string) ([]string, error) {
	var out []string
	serials, err := diskSerials(p.argv)
	if err != nil {
		return nil, err
	}
	for i := 1; i < len(p.argv); i++ {
		flag := p.argv[i]
		if flag == "-S" {
			continue // hutch starts the machine by QMP
		}
		if !strings.HasPrefix(flag, "-") || i+1 == len(p.argv) || strings.HasPrefix(p.argv[i+1], "-") {
			out = append(out, flag) // a flag without a value
			continue
		}
		i++
		value := p.argv[i]
		switch flag {
		case "-name", "-sandbox", "-msg", "-add-fd":
			continue
		case "-kernel", "-initrd", "-append":
			if p.from != nil {
				continue
			}
			value = cmp.Or(map[string]string{"-kernel": p.kernel, "-initrd": p.initrd}[flag], value)
		case "-object":
			value = bareMemory(value, p.from != nil)
		case "-chardev":
			value = bareChardev(value, dir)
		case "-netdev":
			value = "hubport,id=net,hubid=0"
		case "-blockdev":
			value, err = bareBlockdev(value, serials, p.disks)
			if err != nil {
				return nil, err
			}
		}
		out = append(out, flag, value)
	}
	if p.from != nil {
		out = append(out, "-incoming", fmt.Sprintf("fd:%d", bareStateFD))
	}
	return append([]string{p.argv[0]}, out...), nil
}

// bareMemory names the memory by the descriptor that it has in a bare QEMU. A
// number of hutch's own would be any file there.
func bareMemory(value string, private bool) string {
	path := option(value, "mem-path")
	if path == "" {
		return value // another object
	}
	value = strings.Replace(value, "mem-path="+path, fmt.Sprintf("mem-path=/proc/self/fd/%d", bareMemoryFD), 1)
	if private {
		value = strings.Replace(value, "share=on", "share=off", 1)
	}
	return value
}

// bareChardev gives sockets a path, and puts the console into a file.
func bareChardev(value, dir string) string {
	id := option(value, "id")
	if id == "console" {
		return "file,id=console,path=" + filepath.Join(dir, "console.log")
	}
	return fmt.Sprintf("socket,id=%s,path=%s,server=on,wait=off", id, filepath.Join(dir, id+".sock"))
}

// bareBlockdev names the file that stood behind a descriptor set.
func bareBlockdev(value string, serials, disks map[string]string) (string, error) {
	name := option(value, "filename")
	if name == "" {
		return value, nil // the raw layer on top
	}
	node := strings.TrimSuffix(option(value, "node-name"), "-file")
	path, ok := disks[serials[node]]
	if !ok {
		return "", fmt.Errorf("no file for disk %s (serial %q)", node, serials[node])
	}
	return strings.Replace(value, "filename="+name, "filename="+path, 1), nil
}

// diskSerials maps the block nodes of a command line to the disks' serials.
func diskSerials(argv []string) (map[string]string, error) {
	serials := map[string]string{}
	for _, a := range argv {
		if strings.HasPrefix(a, "virtio-blk-pci,") {
			serials[option(a, "drive")] = option(a, "serial")
		}
	}
	if len(serials) == 0 {
		return nil, errors.New("no disks in the sandbox's command line")
	}
	return serials, nil
}

// option returns the value of a key in QEMU's "a,key=value,…" form.
func option(value, key string) string {
	for _, field := range strings.Split(value, ",") {
		if v, ok := strings.CutPrefix(field, key+"="); ok {
			return v
		}
	}
	return ""
}
