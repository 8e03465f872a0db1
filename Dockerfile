# The page on a server of one's own: docker build -t studytiny . && docker run -p 7860:7860 studytiny
FROM python:3.11-slim
WORKDIR /app
# Where CPU builds of PyTorch are, for instance: --build-arg PIP_OPTIONS="--extra-index-url ADDRESS"
ARG PIP_OPTIONS=""
COPY requirements.txt .
RUN sed '/^# 测试/,$d' requirements.txt > needed.txt && pip install --no-cache-dir $PIP_OPTIONS -r needed.txt
COPY . .
ENV GRADIO_SERVER_NAME=0.0.0.0 STUDYTINY_TRAIN=0
EXPOSE 7860
CMD ["python", "app.py"]
