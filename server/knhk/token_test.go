//go:build cgo

package main

import (
	"fmt"
	"os"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
)

func init() { programs["p11key"] = p11key }

// p11key makes a P-256 key pair in the token "knhk" as other tools would: p11key LABEL KIND, where KIND is "nosign" or "exportable".
func p11key() {
	if err := makeKey(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "p11key:", err)
		os.Exit(1)
	}
}

func makeKey(label, kind string) error {
	module, ok := softhsm.Find()
	if !ok {
		return fmt.Errorf("no SoftHSM")
	}
	p := pkcs11.New(module)
	if p == nil {
		return fmt.Errorf("cannot load %s", module)
	}
	if err := p.Initialize(); err != nil {
		return err
	}
	slots, err := p.GetSlotList(true)
	if err != nil {
		return err
	}
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		if err != nil || info.Label != tokenLabel {
			continue
		}
		s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return err
		}
		if err := p.Login(s, pkcs11.CKU_USER, tokenPIN); err != nil {
			return err
		}
		id := []byte{1, 2, 3}
		attr := pkcs11.NewAttribute
		p256 := []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}
		_, _, err = p.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, id), attr(pkcs11.CKA_VERIFY, true),
				attr(pkcs11.CKA_EC_PARAMS, p256)},
			[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, id),
				attr(pkcs11.CKA_SIGN, kind != "nosign"), attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, kind == "exportable")})
		return err
	}
	return fmt.Errorf("no token %q", tokenLabel)
}
