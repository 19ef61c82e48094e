from detector.rpn.rpn import RPN
