// Package template keeps the templates of a host: names for images, with the
// defaults of sandboxes made from them.
//
// It owns <root>/templates/<name>/template.json and says which images are used;
// the images themselves are package image's, which this one alone drives. A
// template appears by rename of a whole file and goes by rename to the trash,
// so that a reader sees all of it or nothing. A template that cannot be read is
// reported and left alone; it does not keep the others from working, and while
// it is there no image is collected, for it may be the one that it names.
//
// It never looks into an image, and knows nothing of sandboxes: whoever
// collects says which images they use.
//
// Tested with images made by the tests; recipes are tested in their package.
package template
