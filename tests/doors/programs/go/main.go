// Package main calls a mesh with net/http, as HTTP/1.1 or as HTTP/2 without TLS. Arguments: how, host:port of REST.
package main

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
)

const (
	one  = `{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}`
	many = 1 << 20 // floats: 4 MiB
)

func main() {
	client := &http.Client{Transport: &http.Transport{}}
	if os.Args[1] == "h2c" {
		protocols := new(http.Protocols)
		protocols.SetUnencryptedHTTP2(true)
		client.Transport = &http.Transport{Protocols: protocols}
	}
	if err := calls(client, "http://"+os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("served")
}

func calls(client *http.Client, base string) error {
	infer := base + "/v2/models/seven/infer"
	for range 20 {
		if err := expect(client, "POST", infer, strings.NewReader(one), nil, `"data":[7.0]`); err != nil {
			return err
		}
	}
	for path, part := range map[string]string{
		"/v2/models/seven":           `"name": "x"`,
		"/v2/models/a%2Fslash/ready": "true",
		"/mesh/v1/models":            `"seven"`,
	} {
		if err := expect(client, "GET", base+path, nil, nil, part); err != nil {
			return err
		}
	}
	var packed bytes.Buffer
	writer := gzip.NewWriter(&packed)
	if _, err := io.WriteString(writer, one); err != nil {
		return err
	}
	writer.Close()
	headers := map[string]string{"Content-Encoding": "gzip"}
	if err := expect(client, "POST", infer, &packed, headers, "7.0"); err != nil {
		return err
	}
	// A reader of unknown length is sent in chunks.
	if err := expect(client, "POST", infer, io.MultiReader(strings.NewReader(one)), nil, "7.0"); err != nil {
		return err
	}
	return large(client, base)
}

func ask(client *http.Client, method, url string, body io.Reader, headers map[string]string) ([]byte, *http.Response, error) {
	request, err := http.NewRequest(method, url, body)
	if err != nil {
		return nil, nil, err
	}
	if method == "POST" {
		request.Header.Set("Content-Type", "application/json")
	}
	for name, value := range headers {
		request.Header.Set(name, value)
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, url, response.Status, answer)
	}
	return answer, response, err
}

func expect(client *http.Client, method, url string, body io.Reader, headers map[string]string, part string) error {
	answer, _, err := ask(client, method, url, body, headers)
	if err == nil && !strings.Contains(string(answer), part) {
		err = fmt.Errorf("%s %s: %s lacks %s", method, url, answer, part)
	}
	return err
}

func large(client *http.Client, base string) error {
	tensor := new(bytes.Buffer)
	for index := range many {
		if err := binary.Write(tensor, binary.LittleEndian, float32(index)); err != nil {
			return err
		}
	}
	head := fmt.Sprintf(`{"inputs": [{"name": "x", "datatype": "FP32", "shape": [%d], "parameters": {"binary_data_size": %d}}],`+
		` "parameters": {"binary_data_output": true}}`, many, 4*many)
	name := "Inference-Header-Content-Length"
	headers := map[string]string{"Content-Type": "application/octet-stream", name: strconv.Itoa(len(head))}
	body := append([]byte(head), tensor.Bytes()...)
	answer, response, err := ask(client, "POST", base+"/v2/models/a%2Fslash/infer", bytes.NewReader(body), headers)
	if err != nil {
		return err
	}
	begin, err := strconv.Atoi(response.Header.Get(name))
	if err == nil && !bytes.Equal(answer[begin:], tensor.Bytes()) {
		err = fmt.Errorf("the large body came back changed")
	}
	return err
}
