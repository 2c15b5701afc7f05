package kubeconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"

	"go.yaml.in/yaml/v3"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// Lists of a kubeconfig whose elements have names.
func lists() []string { return []string{"clusters", "contexts", "users"} }

const currentKey = "current-context"

// merge returns the text with the entries in it. Use makes them current.
func merge(text []byte, e Entries, use bool) ([]byte, error) {
	one, err := e.YAML()
	if err != nil {
		return nil, err
	}
	return change(text, func(c *api.Config) {
		e.put(c)
		if use {
			c.CurrentContext = e.Name
		}
	}, func(top *yaml.Node) error {
		var from yaml.Node
		if err := yaml.Unmarshal(one, &from); err != nil {
			return err
		}
		for _, key := range lists() {
			if err := putNamed(top, key, e.Name, value(from.Content[0], key).Content[0]); err != nil {
				return err
			}
		}
		if use {
			setScalar(top, currentKey, e.Name)
		}
		return nil
	})
}

// remove returns the text without the entries of that name. When they were
// current, nothing is from then on.
func remove(text []byte, name string) ([]byte, error) {
	return change(text, func(c *api.Config) {
		delete(c.Clusters, name)
		delete(c.AuthInfos, name)
		delete(c.Contexts, name)
		if c.CurrentContext == name {
			c.CurrentContext = ""
		}
	}, func(top *yaml.Node) error {
		for _, key := range lists() {
			dropNamed(value(top, key), name)
		}
		if v := value(top, currentKey); v != nil && v.Value == name {
			setScalar(top, currentKey, "")
		}
		return nil
	})
}

// change changes what a text means, by changing the text. Where the outcome is
// not what was meant, the text is written anew from what it means.
func change(text []byte, mean func(*api.Config), edit func(top *yaml.Node) error) ([]byte, error) {
	want, err := clientcmd.Load(text)
	if err != nil {
		return nil, err
	}
	mean(want)
	edited, err := editText(text, edit)
	if err != nil {
		return nil, err
	}
	got, err := clientcmd.Load(edited)
	if err == nil && reflect.DeepEqual(got, want) {
		return edited, nil
	}
	return clientcmd.Write(*want)
}

// compactList matches lists that are written as kubectl does, without indent.
var compactList = regexp.MustCompile(`(?m)^(clusters|contexts|users):\s*(#.*)?\n- `)

// spacedList matches lists that are written with one.
var spacedList = regexp.MustCompile(`(?m)^(clusters|contexts|users):\s*(#.*)?\n +- `)

func editText(text []byte, edit func(top *yaml.Node) error) ([]byte, error) {
	doc, err := parse(text)
	if err != nil {
		return nil, err
	}
	if err := edit(doc.Content[0]); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	encoder := yaml.NewEncoder(&b)
	encoder.SetIndent(2)
	if compactList.Match(text) || !spacedList.Match(text) {
		encoder.CompactSeqIndent()
	}
	if err := encoder.Encode(doc); err != nil {
		return nil, err
	}
	return b.Bytes(), encoder.Close()
}

// parse returns the one document of text, a mapping. A text without any is the
// beginning of one.
func parse(text []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	err := decoder.Decode(&doc)
	if errors.Is(err, io.EOF) || err == nil && doc.Content[0].Tag == "!!null" {
		err = yaml.Unmarshal(append([]byte("apiVersion: v1\nkind: Config\n"), comments(text)...), &doc)
	} else if err == nil && !errors.Is(decoder.Decode(&second), io.EOF) {
		return nil, errors.New("it holds more than one document")
	}
	if err != nil {
		return nil, err
	}
	if doc.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("it is no mapping")
	}
	return &doc, nil
}

// comments returns the lines of text that are only that.
func comments(text []byte) []byte {
	var b []byte
	for line := range bytes.Lines(text) {
		if bytes.HasPrefix(bytes.TrimSpace(line), []byte("#")) {
			b = append(b, line...)
		}
	}
	return b
}

// value returns the value of key, nil when there is none.
func value(mapping *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == key {
			return mapping.Content[i+1]
		}
	}
	return nil
}

func setScalar(mapping *yaml.Node, key, s string) {
	v := value(mapping, key)
	if v == nil {
		v = &yaml.Node{}
		mapping.Content = append(mapping.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: key}, v)
	}
	v.Kind, v.Tag, v.Value, v.Alias, v.Content = yaml.ScalarNode, "!!str", s, nil, nil
	v.Style = 0
	if s == "" {
		v.Style = yaml.DoubleQuotedStyle
	}
}

// putNamed puts item into the list at key, in the place of the one that has its
// name.
func putNamed(top *yaml.Node, key, name string, item *yaml.Node) error {
	list := value(top, key)
	switch {
	case list == nil:
		list = &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		top.Content = append(top.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: key}, list)
	case list.Tag == "!!null":
		list.Kind, list.Tag, list.Value, list.Style = yaml.SequenceNode, "!!seq", "", 0
	case list.Kind != yaml.SequenceNode:
		return fmt.Errorf("%s is no list", key)
	case len(list.Content) == 0:
		list.Style = 0 // "[]" would go on in one line
	}
	for i, old := range list.Content {
		if v := value(old, "name"); v != nil && v.Value == name {
			item.HeadComment, item.LineComment, item.FootComment = old.HeadComment, old.LineComment, old.FootComment
			list.Content[i] = item
			return nil
		}
	}
	list.Content = append(list.Content, item)
	return nil
}

func dropNamed(list *yaml.Node, name string) {
	if list == nil || list.Kind != yaml.SequenceNode {
		return
	}
	kept := list.Content[:0]
	for _, item := range list.Content {
		if v := value(item, "name"); v == nil || v.Value != name {
			kept = append(kept, item)
		}
	}
	list.Content = kept
}
